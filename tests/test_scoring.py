"""Scores: the ids that the harness feeds a model, and scores against a computation by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import END, START, make_tiny_adapter, make_tiny_tokenizer
from tiny_spec import SENTENCES, write_rows, write_tiny_spec
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from training.data.items import read_items
from training.evaluation.harness import HarnessModel
from training.evaluation.scoring import (
    Answered,
    ScoreJob,
    _score_suite,
    cached_scores,
    protocol_hash,
    protocol_of,
    read_scores,
    score_model,
)
from training.evaluation.suites import encode_item
from training.spec import Accuracy, RunSpec
from training.specfile import load_spec
from training.workspace import Workspace

NEW_TOKENS = 4
CHOICES = ("red", "green", "blue sky")


@dataclass(frozen=True)
class Scored:
    """A spec over every kind of suite, and the answers of a model to it."""

    spec: RunSpec
    answers: dict[str, list[Answered]]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def starting_tokenizer(folder: Path) -> None:
    """Replace a model's tokenizer by one that puts a start token before every text."""
    made = make_tiny_tokenizer()
    start = made.convert_tokens_to_ids(START)
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, start)])
    made.save_pretrained(folder)


def render(question: str, chat: bool) -> str:
    """A prompt by hand: the tiny model's template, or the text alone."""
    return f"{START}user\n{question}{END}\n{START}assistant\n" if chat else question


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """What a model says after a prompt, one most likely token at a time."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    given: list[int] = []
    while len(given) < NEW_TOKENS:
        with torch.no_grad():
            following = int(model(torch.tensor([ids + given])).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        given.append(following)
    return str(tokenizer.decode(given, skip_special_tokens=True))


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> float:
    """The log-probability of a target after a prompt, in nats."""
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    second = tokenizer(target, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([first + second])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(first) + n - 1, token]) for n, token in enumerate(second))


def suites(chat: bool) -> dict[str, Any]:
    """One suite of every kind, all in chat form or all plain (text is always plain)."""
    form = {"chat": chat}
    exact = {"name": "sums", "path": "answers.jsonl", "metric": "exact_match", "prompt": "question"}
    exact |= {"completion": "answer", "max_new_tokens": NEW_TOKENS, **form}
    colours = {"name": "colours", "path": "colours.jsonl", "metric": "accuracy", "prompt": "question"}
    colours |= {"choices": list(CHOICES), "answer": "answer", **form}
    pairs = {"name": "pairs", "path": "sums.jsonl", "metric": "cross_entropy", "prompt": "question"}
    pairs |= {"completion": "answer", **form}
    text = {"name": "sentences", "path": "sentences.jsonl", "metric": "cross_entropy", "text": "text"}
    return {"target": [exact], "retention": [colours, pairs, text]}


def score(folder: Path, spec: RunSpec, artifact: Path | None, *, is_adapter: bool = False) -> dict[str, list[Answered]]:
    target = folder / "scores.json"
    artifact_path = str(artifact) if artifact else None
    job = ScoreJob(
        spec.model_dump(mode="json"), spec.model, artifact_path, is_adapter, str(target), str(folder / "log")
    )
    assert score_model(job) > 0
    return read_scores(target)[0]


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def scored(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Answers of the tiny model, where every other exact-match item expects what it says."""
    chat: bool = request.param
    folder = tmp_path_factory.mktemp("scored")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    write_tiny_spec(folder, tiny_model)
    questions = [f"what is {n}+{n}" for n in range(8)]
    said = [greedy(model, tokenizer, render(question, chat)).strip() for question in questions]
    rows = [
        {"question": q, "answer": a if n % 2 and a else "?"}
        for n, (q, a) in enumerate(zip(questions, said, strict=True))
    ]
    write_rows(folder / "answers.jsonl", rows)
    write_rows(folder / "colours.jsonl", [{"question": f"colour {n}", "answer": n % 3} for n in range(9)])
    spec = load_spec(write_tiny_spec(folder, tiny_model, suites=suites(chat)))
    return Scored(spec, score(folder, spec, None), model, tokenizer)


def is_chat(scored: Scored) -> bool:
    return scored.spec.suites.target[0].chat is True


def test_exact_match_is_the_greedy_answer_compared(scored: Scored) -> None:
    answers = scored.answers["sums"]
    for answer in answers:
        said = greedy(scored.model, scored.tokenizer, render(answer.prompt, is_chat(scored)))
        assert answer.answer.strip() == said.strip()
        assert answer.score == float(said.strip() == answer.expected)
    assert {answer.score for answer in answers} == {0.0, 1.0}
    assert {answer.weight for answer in answers} == {1.0}


def test_accuracy_is_whether_the_likeliest_choice_is_right(scored: Scored) -> None:
    space = "" if is_chat(scored) else " "
    for answer in scored.answers["colours"]:
        prompt = render(answer.prompt, is_chat(scored))
        likelihoods = [log_likelihood(scored.model, scored.tokenizer, prompt, space + choice) for choice in CHOICES]
        chosen = CHOICES[likelihoods.index(max(likelihoods))]
        assert (answer.answer, answer.score) == (chosen, float(chosen == answer.expected))
    assert {answer.score for answer in scored.answers["colours"]} == {0.0, 1.0}


def test_cross_entropy_of_a_completion_is_in_nats_per_byte(scored: Scored) -> None:
    space = "" if is_chat(scored) else " "
    for answer in scored.answers["pairs"]:
        prompt = render(answer.prompt, is_chat(scored))
        nats = -log_likelihood(scored.model, scored.tokenizer, prompt, space + answer.expected)
        assert answer.score == pytest.approx(nats / len(space + answer.expected), rel=1e-4)


def test_cross_entropy_of_text_counts_every_byte_after_one_start_token(scored: Scored) -> None:
    answers = scored.answers["sentences"]
    assert [answer.expected for answer in answers] == list(SENTENCES)
    for answer in answers:
        nats = -log_likelihood(scored.model, scored.tokenizer, START, answer.expected)
        assert answer.score == pytest.approx(nats / len(answer.expected), rel=1e-4)
        assert answer.weight == len(answer.expected)


def test_weights_of_a_cross_entropy_are_the_bytes_that_it_is_a_mean_over(scored: Scored) -> None:
    space = "" if is_chat(scored) else " "
    assert [answer.weight for answer in scored.answers["pairs"]] == [
        len(space + answer.expected) for answer in scored.answers["pairs"]
    ]


def test_an_untrained_adapter_scores_as_its_base_and_a_random_one_does_not(scored: Scored, tmp_path: Path) -> None:
    base = Path(scored.spec.model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "untrained"))
    untrained = score(tmp_path, scored.spec, tmp_path / "untrained", is_adapter=True)
    for name, answers in scored.answers.items():
        for expected, found in zip(answers, untrained[name], strict=True):
            assert found.score == pytest.approx(expected.score, abs=1e-5)
            assert replace(found, answer="", score=0.0) == replace(expected, answer="", score=0.0)
    other = score(tmp_path, scored.spec, make_tiny_adapter(base, tmp_path / "random"), is_adapter=True)
    pairs = zip(other["sentences"], scored.answers["sentences"], strict=True)
    assert min(abs(found.score - expected.score) for found, expected in pairs) > 1e-3


@pytest.mark.parametrize("starts", [False, True], ids=["bare", "starting"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_the_harness_feeds_the_ids_of_training(tiny_model: Path, tmp_path: Path, chat: bool, starts: bool) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    if starts:
        starting_tokenizer(folder)
    write_tiny_spec(tmp_path, folder)
    write_rows(tmp_path / "answers.jsonl", [{"question": "what is 3+4", "answer": "7"}])
    write_rows(tmp_path / "colours.jsonl", [{"question": "colour?\n", "answer": 1}])
    spec = load_spec(write_tiny_spec(tmp_path, folder, suites=suites(chat)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    harness = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=1)
    fed: list[tuple[int, ...]] = []
    hook = lambda _, args, kwargs: fed.append(tuple((args[0] if args else kwargs["input_ids"])[0].tolist()))  # noqa: E731
    harness.model.register_forward_pre_hook(hook, with_kwargs=True)
    for suite in spec.suites.all:
        fed.clear()
        _score_suite(suite, harness)
        for item in read_items(suite):
            example = encode_item(suite, item, tokenizer, 1000)
            prompt = example.ids[: example.is_target.index(True)]
            expected = prompt if suite.metric == "exact_match" else example.ids[:-1]
            assert expected in fed
            assert expected.count(tokenizer.bos_token_id) == (
                2 if chat and item.prompt else int(starts or not item.prompt)
            )


def test_accuracy_is_that_of_the_harness_alone(tiny_model: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    rows = [{"question": f"colour {n}", "choices": list(CHOICES), "answer": n % 3} for n in range(12)]
    path = write_rows(tmp_path / "colours.jsonl", rows)
    config = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    language_model = HFLM(pretrained=str(tiny_model), device="cpu", dtype="float32", batch_size=4)
    results = simple_evaluate(language_model, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    assert results is not None
    suite = Accuracy(name="c", path=path, metric="accuracy", prompt="question", choices="choices", answer="answer")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ours = _score_suite(
        suite, HarnessModel(pretrained=str(tiny_model), tokenizer=tokenizer, device="cpu", batch_size=4)
    )
    mean = sum(answer.score for answer in ours) / len(ours)
    assert 0 < mean < 1
    assert results["results"]["colours"]["acc,none"] == pytest.approx(mean)


def test_probes_are_teacher_forced_log_probabilities_of_the_model(scored: Scored, tmp_path: Path) -> None:
    score(tmp_path, scored.spec, None)
    _, probes = read_scores(tmp_path / "scores.json")
    assert len(probes) == 4
    for probe in probes:
        with torch.no_grad():
            log_probs = scored.model(torch.tensor([probe.token_ids])).logits[0].log_softmax(-1)
        expected = [float(log_probs[n, token]) for n, token in enumerate(probe.token_ids[1:])]
        assert probe.log_probs == pytest.approx(expected, abs=1e-4)


def test_the_protocol_changes_with_all_that_decides_a_score(tiny_model: Path, tmp_path: Path) -> None:
    def key(precision: str = "float32", **changes: Any) -> str:
        spec = load_spec(write_tiny_spec(tmp_path, tiny_model, **changes))
        return protocol_hash(protocol_of(spec, precision), tiny_model)

    default = key()
    assert key() == default
    assert key(training={"epochs": 3}) == default
    assert key(rows=20) == default
    target = {
        "name": "sums",
        "path": "sums.jsonl",
        "metric": "exact_match",
        "prompt": "question",
        "completion": "answer",
    }
    others = [key("bfloat16"), key(suites={"target": [target]}), key(suites={"target": [{**target, "limit": 3}]})]
    spec = load_spec(write_tiny_spec(tmp_path, tiny_model))
    write_rows(tmp_path / "sums.jsonl", [{"question": "1+1", "answer": "2"}])
    others.append(protocol_hash(protocol_of(spec, "float32"), tiny_model))
    assert len({default, *others}) == 5


def test_scores_are_kept_by_the_content_of_model_and_protocol(tiny_model: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    adapters = [make_tiny_adapter(tiny_model, tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2)]
    again = make_tiny_adapter(tiny_model, tmp_path / "again", seed=1)
    first, second = (cached_scores(workspace, adapter, "key") for adapter in adapters)
    assert cached_scores(workspace, again, "key") == first
    assert len({first, second, cached_scores(workspace, adapters[0], "other key")}) == 3
