"""Suites of free text, chat turns and perplexity through a real tiny model; the base is never scored twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tiny import END, START
from tiny_spec import SENTENCES, write_rows, write_tiny_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import pipeline
from training import stages
from training.data.items import Answered
from training.evaluation.judge import build_scorecard
from training.evaluation.scorecard import Probe
from training.evaluation.scoring import (
    ScoreJob,
    base_log_probs,
    cached_scores,
    protocol_hash,
    protocol_of,
    read_scores,
    score_model,
)
from training.models import hash_folder
from training.spec import RunSpec
from training.specfile import load_spec
from training.workspace import RunFolder, Workspace, write_json

NEW_TOKENS = 4


@dataclass(frozen=True)
class Scored:
    """A spec, and what the tiny model made of it."""

    spec: RunSpec
    answers: dict[str, list[Answered]]
    probes: tuple[Probe, ...]


def suites() -> dict[str, Any]:
    asked = {"path": "sums.jsonl", "prompt": "question", "max_new_tokens": NEW_TOKENS}
    target = {"name": "f1", "metric": "token_f1", "completion": "answer", **asked}
    turns = {"name": "turns", "path": "turns.jsonl", "metric": "exact_match", "messages": "turns"}
    turns |= {"max_new_tokens": NEW_TOKENS}
    surprise = {"name": "surprise", "path": "turns.jsonl", "metric": "cross_entropy", "messages": "turns"}
    text = {"name": "text", "path": "sentences.jsonl", "metric": "perplexity", "text": "text"}
    digits = {"name": "digits", "metric": "regex", "pattern": r"\d", **asked}
    same = {"name": "same", "metric": "agreement", **asked}
    choice = {"name": "choice", "path": "sums.jsonl", "metric": "accuracy", "prompt": "question"}
    choice |= {"choices": ["0", "a much longer choice"], "answer": "right", "normalise": "bytes"}
    return {"target": [target], "retention": [turns, surprise, text, digits, same, choice]}


def score(folder: Path, spec: RunSpec, artifact: Path | None) -> tuple[dict[str, list[Answered]], tuple[Probe, ...]]:
    target = folder / "scores.json"
    path = str(artifact) if artifact else None
    job = ScoreJob(spec.model_dump(mode="json"), spec.model, path, bool(path), str(target), str(folder / "log"))
    score_model(job)
    return read_scores(target)


@pytest.fixture(scope="module")
def scored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("scored")
    path = write_tiny_spec(folder, tiny_model, suites=suites())
    write_rows(folder / "sums.jsonl", [{"question": f"what is {n}", "answer": str(n), "right": 0} for n in range(6)])
    turns = [("system", "You add."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    row = {"turns": [{"role": role, "content": content} for role, content in turns]}
    write_rows(folder / "turns.jsonl", [row])
    spec = load_spec(path)
    return Scored(spec, *score(folder, spec, None))


def test_chat_turns_are_rendered_up_to_the_last_answer(scored: Scored, tiny_model: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    said = [("system", "You add."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2")]
    prompt = "".join(f"{START}{role}\n{content}{END}\n" for role, content in said) + f"{START}assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = tokenizer("4", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits[0, -1].log_softmax(-1)
    (item,) = scored.answers["surprise"]
    assert (item.prompt, item.expected) == ("2+2", "4")
    assert item.score == pytest.approx(-float(log_probs[answer[0]]), rel=1e-4)


def test_perplexity_is_the_exponential_of_nats_per_token(scored: Scored, tiny_model: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(START + SENTENCES[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    item = scored.answers["text"][0]
    assert item.score == pytest.approx(loss, rel=1e-4)
    assert item.weight == ids.shape[1] - 1
    assert math.exp(item.score) > 1


def test_choices_may_be_compared_per_byte(scored: Scored) -> None:
    assert {answer.chance for answer in scored.answers["choice"]} == {0.5}
    assert {answer.answer for answer in scored.answers["choice"]} <= {"0", "a much longer choice"}


def test_a_scorecard_holds_every_suite_of_an_artifact_compared_with_itself(scored: Scored, tmp_path: Path) -> None:
    both = (scored.answers, scored.probes)
    base = Path(scored.spec.model)
    protocol = protocol_of(scored.spec, "float32")
    card = build_scorecard(
        run_id="r-1",
        spec=scored.spec,
        artifact_hash=hash_folder(base),
        protocol=protocol,
        protocol_hash=protocol_hash(protocol, base),
        base=both,
        tuned=both,
        seconds=1.0,
    )
    assert {suite.change for suite in card.suites} == {0.0}
    assert {(suite.lost, suite.won, suite.p_holm) for suite in card.suites} == {(0, 0, 1.0)}
    assert {suite.agreement for suite in card.suites if suite.unit == "share"} == {1.0}
    write_json(tmp_path / "scorecard.json", card.model_dump(mode="json"))  # no infinity in it
    assert card.contract.verdict == "kept"


def test_an_untrained_adapter_gives_the_bases_log_probabilities(scored: Scored, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(scored.spec.model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "untrained"))
    answers, probes = score(tmp_path, scored.spec, tmp_path / "untrained")
    assert len(probes) == len(scored.probes) > 0
    for expected, found in zip(scored.probes, probes, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    for name, items in scored.answers.items():
        assert [item.score for item in answers[name]] == pytest.approx([item.score for item in items], abs=1e-5)


def test_a_second_run_costs_no_base_model_work(scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored is told by the jobs that are sent: the base is in the first run's alone."""
    workspace, jobs = Workspace.at(tmp_path / "ws"), []

    def run_tasks(_: Any, wanted: list[ScoreJob], *__: Any) -> list[float]:
        jobs.append([Path(job.log).stem for job in wanted])
        answers = {name: [vars(item) for item in items] for name, items in scored.answers.items()}
        for job in wanted:
            probes = [probe.model_dump() for probe in scored.probes]
            write_json(Path(job.target), {"suites": answers, "probes": probes, "kl": {}, "seconds": 1.0})
            base_log_probs(Path(job.target)).touch()
        return [1.0] * len(wanted)

    monkeypatch.setattr("training.evaluation.spread.run_tasks", run_tasks)
    monkeypatch.setattr("training.evaluation.spread.num_places", lambda *_: 1)
    for number in (1, 2):
        run = RunFolder(workspace.runs / f"tiny-{number}")
        run.artifact.mkdir(parents=True)
        (run.artifact / "adapter_model.safetensors").write_text(f"of run {number}")
        stages.check_power(run, scored.spec, workspace)
        pipeline.score_run(run, scored.spec, workspace)
    assert [wave for wave in jobs if wave] == [["score-base"], ["score-tuned"], ["score-tuned"]]


def test_other_data_is_another_protocol(scored: Scored, tmp_path: Path) -> None:
    base, workspace = Path(scored.spec.model), Workspace.at(tmp_path)

    def cached(spec: RunSpec) -> Path:
        return cached_scores(workspace, base, protocol_hash(protocol_of(spec, "float32"), base))

    before = cached(scored.spec)
    assert cached(scored.spec) == before
    target = scored.spec.suites.target[0]
    other = write_rows(tmp_path / "other.jsonl", [{"question": "what is 7", "answer": "7"}])
    changed = scored.spec.suites.model_copy(update={"target": (target.model_copy(update={"path": other}),)})
    assert cached(scored.spec.model_copy(update={"suites": changed})) != before


def test_a_prompt_that_several_suites_ask_is_answered_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three suites over the same prompts, one of them with fewer new tokens: that one alone is answered anew."""
    asked: list[int] = []
    generate = HFLM.generate_until
    count = lambda self, requests, **rest: asked.append(len(requests)) or generate(self, requests, **rest)  # noqa: E731
    monkeypatch.setattr(HFLM, "generate_until", count)
    questions = {"path": "sums.jsonl", "prompt": "question", "completion": "answer"}
    names = {"exact_match": NEW_TOKENS, "token_f1": NEW_TOKENS, "chrf": NEW_TOKENS - 1}
    made = [{"name": name, "metric": name, **questions, "max_new_tokens": most} for name, most in names.items()]
    path = write_tiny_spec(tmp_path, tiny_model, suites={"target": made[:1], "retention": made[1:]})
    write_rows(tmp_path / "sums.jsonl", [{"question": f"what is {n}", "answer": str(n)} for n in range(6)])
    answers, _ = score(tmp_path, load_spec(path), None)
    assert asked == [6, 6]
    first, second, _ = ([answer.answer for answer in answers[name]] for name in names)
    assert first == second
