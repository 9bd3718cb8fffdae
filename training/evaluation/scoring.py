"""Scores one model on every suite with lm-evaluation-harness, in a process of its own.

Prompts are rendered here, by the code that training uses, and handed to the harness as plain text; so a suite's
tokens are the tokens of training and serving. Scores of a model under a protocol are cached by content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from training.data.encoding import load_tokenizer
from training.data.items import Answered, SuiteItem, read_items
from training.data.locations import hash_data
from training.data.tokens import text_ids
from training.errors import fail
from training.evaluation.kl import kl_to_base
from training.evaluation.metrics import NATS, worth_of
from training.evaluation.scorecard import Probe
from training.evaluation.suites import Question, RenderedItem, context_ids, encode_items, render_item
from training.models import hash_file, hash_folder
from training.spec import RunSpec
from training.suite_spec import (
    Accuracy,
    Answering,
    AnySuite,
    Classification,
    CrossEntropy,
    FileSuite,
    GreedyMatch,
    Harness,
    Perplexity,
    ValidJson,
)
from training.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.evaluation.harness import HarnessModel

PROBE_PROMPTS = 4
PROBE_TOKENS = 48
_PROBE_SENTENCE = "The sun rises in the east, and it sets in the west."
_SCORING_VERSION = 5
_DIVERGED = "the training diverged: lower training.learning_rate, or set training.precision: fp32"


@dataclass(frozen=True)
class ScoreJob:
    """What a scoring process is sent: the base, an adapter or a whole tuned model, and where to put the answer.

    `base_scores` is where the base's own answer lies, with whose distributions a tuned model's are compared; without
    it they are not. A part of a job (training/evaluation/parts.py) names its `suites`; the first has the probes and the
    comparison with the base.
    """

    spec: dict[str, Any]
    base: str
    artifact: str | None
    is_adapter: bool
    target: str
    log: str
    base_scores: str | None = None
    suites: tuple[str, ...] | None = None
    is_first: bool = True


def protocol_of(spec: RunSpec, precision: str) -> dict[str, str | int | float | bool | None]:
    """All that decides a score beside the model: suites, their data, rendering, decoding, harness."""
    protocol: dict[str, str | int | float | bool | None] = {
        "scoring": _SCORING_VERSION,
        "harness": version("lm_eval"),
        "transformers": version("transformers"),
        "precision": precision,
        "decoding": "greedy",
        "few_shot": 0,
    }
    if spec.evaluation.engine == "vllm":
        protocol["engine"] = f"vllm {_vllm_version()}"
    unscored = {"path", "min_gain", "max_loss", "json_schema", "inherited_from"}
    for suite in spec.suites.every:
        settings = suite.model_dump(mode="json", exclude=unscored)
        protocol[f"suite.{suite.name}"] = json.dumps(settings, sort_keys=True)
        protocol[f"data.{suite.name}"] = _hash_of_data(suite)
        if isinstance(suite, ValidJson) and suite.json_schema is not None:
            protocol[f"schema.{suite.name}"] = hash_file(Path(suite.json_schema))
    return protocol


def _vllm_version() -> str:
    from vllm import __version__

    return str(__version__)


def _hash_of_data(suite: AnySuite) -> str:
    if isinstance(suite, Harness):
        from training.evaluation.harness_tasks import hash_task

        return hash_task(suite)
    return hash_data(suite.path)


def protocol_hash(protocol: dict[str, Any], base: Path) -> str:
    """A hash of the protocol and of the base's tokenizer and chat template, which render every prompt."""
    rendering = [base / name for name in ("tokenizer.json", "chat_template.jinja") if (base / name).is_file()]
    parts = [protocol, [hash_file(file) for file in rendering]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached_scores(workspace: Workspace, model: Path, key: str) -> Path:
    """Where the scores of a model under a protocol lie, or will lie."""
    digest = hashlib.sha256(f"{hash_folder(model)}/{key}".encode()).hexdigest()[:32]
    return workspace.cache / "scores" / f"{digest}.json"


def score_model(job: ScoreJob) -> float:
    """Load a model, score it, write its answers and probes to the job's target. The seconds it took."""
    from training.faults import explained_at, output_to

    with output_to(Path(job.log)), explained_at(Path(job.log)), alone():
        started = time.monotonic()
        spec = RunSpec.model_validate(job.spec)
        written = _written_by_vllm(job, spec) if spec.evaluation.engine == "vllm" else None
        language_model = _load(job)
        if written is not None:
            language_model.know(written)
        suites = answers_to(_asked(job, spec), language_model)
        probes = probes_of(spec, language_model) if job.is_first else ()
        kl = _kl(job, spec, language_model) if job.is_first else {}
        seconds = time.monotonic() - started
        answers = {name: [vars(answer) for answer in answers] for name, answers in suites.items()}
        told = [probe.model_dump(mode="json") for probe in probes]
        write_json(Path(job.target), {"suites": answers, "probes": told, "kl": kl, "seconds": seconds})
    return seconds


def ask_suites(spec: RunSpec, language_model: HarnessModel) -> tuple[dict[str, list[Answered]], tuple[Probe, ...]]:
    """A loaded model's answers to every suite of a spec by the suite's name, and its probes."""
    return answers_to(spec.suites.every, language_model), probes_of(spec, language_model)


def _asked(job: ScoreJob, spec: RunSpec) -> list[AnySuite]:
    return [suite for suite in spec.suites.every if job.suites is None or suite.name in job.suites]


def _written_by_vllm(job: ScoreJob, spec: RunSpec) -> dict[Question, str]:
    """The answers to all that the job's suites ask, before the model is loaded to be read."""
    import torch

    from training.evaluation import vllm_answers as vllm

    gpu, base = torch.cuda.is_available(), Path(job.base)
    tokenizer = load_tokenizer(base)
    asked = [suite for suite in _asked(job, spec) if isinstance(suite, get_args(Answering))]
    weights = vllm.Weights.of(base, Path(job.artifact) if job.artifact else None, spec.tuning)
    questions = vllm.questions_of(asked, tokenizer, vllm.max_length_of(weights.model, tokenizer))
    return vllm.answer(weights, questions, tokenizer, scoring_precision(int(gpu)), gpu=gpu)


def answers_to(suites: Sequence[AnySuite], language_model: HarnessModel) -> dict[str, list[Answered]]:
    """A loaded model's answers by the suite's name."""
    return {suite.name: _checked(suite, _score_suite(suite, language_model)) for suite in suites}


def probes_of(spec: RunSpec, language_model: HarnessModel) -> tuple[Probe, ...]:
    """Teacher-forced log-probabilities of a few prompts of a spec's suites."""
    return tuple(Probe.model_validate(probe) for probe in _probe(spec.suites.all, language_model))


def _checked(suite: AnySuite, answers: list[Answered]) -> list[Answered]:
    """The answers, whose scores are numbers: a mean over one that is none says nothing.

    Raises:
        TenureError: one is none.
    """
    for index, answer in enumerate(answers):
        if not math.isfinite(answer.score):
            what = f"the model gives item {index} a score that is no finite number ({answer.score})"
            raise fail(what, suite.name, _DIVERGED)
    return answers


def held_model(model: Any, base: Path) -> HarnessModel:
    """A model that is in memory already, as the harness wants it; `base` gives the tokenizer."""
    from training.evaluation.harness import HarnessModel

    return HarnessModel(pretrained=model, tokenizer=load_tokenizer(base))


def _kl(job: ScoreJob, spec: RunSpec, language_model: HarnessModel) -> dict[str, list[tuple[float, int]]]:
    """KL to the base by role; the base leaves its log-probabilities beside its scores."""
    is_base = job.artifact is None
    beside = job.base_scores or (job.target if is_base else None)
    if beside is None:
        return {}
    tokenizer, most = language_model.tokenizer, language_model.max_length
    return kl_to_base(spec, language_model.model, tokenizer, most, base_log_probs(Path(beside)), is_base=is_base)


def base_log_probs(scores: Path) -> Path:
    """Where the base's log-probabilities lie that belong to its scores."""
    return scores.with_suffix(".safetensors")


def is_scored(scores: Path, *, is_base: bool) -> bool:
    """Whether a model's scores are there, and the base's log-probabilities with its own."""
    return scores.is_file() and (not is_base or base_log_probs(scores).is_file())


@contextmanager
def alone() -> Iterator[None]:
    """Without the process group that a launcher around the command may have named: the harness would join it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    named = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(named)


def read_scores(path: Path) -> tuple[dict[str, list[Answered]], tuple[Probe, ...]]:
    """Answers by suite and probes, as score_model wrote them."""
    raw = read_json(path)
    answers = {name: [Answered(**answer) for answer in answers] for name, answers in raw["suites"].items()}
    return answers, tuple(Probe.model_validate(probe) for probe in raw["probes"])


def read_kl(path: Path) -> dict[str, list[tuple[float, int]]]:
    """KL to the base by role: for every item that was looked at its sum in nats, and its target tokens."""
    return {role: [(nats, count) for nats, count in found] for role, found in read_json(path)["kl"].items()}


def scoring_precision(gpus: int) -> str:
    """The precision that serving uses on the same hardware: scores are of what will be served."""
    return "bfloat16" if gpus else "float32"


def _load(job: ScoreJob) -> HarnessModel:
    import torch

    from training.evaluation.harness import HarnessModel

    gpu = torch.cuda.is_available()
    path = job.base if job.is_adapter or job.artifact is None else job.artifact
    return HarnessModel(
        pretrained=path,
        tokenizer=load_tokenizer(Path(job.base)),
        peft=job.artifact if job.is_adapter else None,
        dtype=scoring_precision(int(gpu)),
        device="cuda" if gpu else "cpu",
        trust_remote_code=False,
    )


def _score_suite(suite: AnySuite, language_model: HarnessModel) -> list[Answered]:
    """Every item's answer, in order, from the harness's own sample log.

    The harness's `evaluate` is called below its `simple_evaluate`, which spends ten seconds describing the machine.
    """
    from lm_eval.evaluator import evaluate

    if isinstance(suite, Harness):
        from training.evaluation.harness_tasks import score_task

        return score_task(suite, language_model)
    items = read_items(suite)
    language_model.suite = suite
    if isinstance(suite, GreedyMatch):
        return _matched(suite, items, language_model)
    task = _harness_task(suite, [render_item(suite, item, language_model.tokenizer) for item in items], language_model)
    results = evaluate(language_model, {suite.name: task}, bootstrap_iters=0, log_samples=True)
    assert results is not None
    samples = sorted(results["samples"][suite.name], key=lambda sample: int(sample["doc_id"]))
    return [_answered(suite, item, sample) for item, sample in zip(items, samples, strict=True)]


def _matched(suite: GreedyMatch, items: Sequence[SuiteItem], language_model: HarnessModel) -> list[Answered]:
    """Whether greedy decoding gives each completion and its end token, as they would be trained on."""
    encoded = encode_items(suite, items, language_model.tokenizer, language_model.max_length)
    starts = [max(1, row.is_target.index(True)) for row in encoded]
    asked = [(row.ids[:start], row.ids[start:]) for row, start in zip(encoded, starts, strict=True)]
    found = zip(items, language_model.likelihoods(asked), strict=True)
    return [
        Answered(
            item.prompt, item.completion, item.completion if same else f"another ({nats:.2f} nats)", float(same), 1.0
        )
        for item, (nats, same) in found
    ]


def _harness_task(suite: FileSuite, rendered: list[RenderedItem], language_model: HarnessModel) -> Any:
    """The suite as a task of the harness, over documents that hold whole prompts and what a score is divided by."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def document(item: RenderedItem) -> dict[str, Any]:
        per_token = isinstance(suite, Perplexity)
        size = len(text_ids(language_model.tokenizer, item.target)) if per_token else len(item.target.encode())
        return vars(item) | {"choices": list(item.choices), "size": size}

    documents = datasets.Dataset.from_list([document(item) for item in rendered])
    return ConfigurableTask(
        config={
            "task": suite.name,
            "custom_dataset": lambda **_: datasets.DatasetDict({"test": documents}),
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "target_delimiter": "",
            "num_fewshot": 0,
            **_TASK_SETTINGS[type(suite)](suite),
        }
    )


def _answering_settings(suite: Answering) -> dict[str, Any]:
    def process(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"score": worth_of(suite, results[0], document["target"]).score}

    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": suite.max_new_tokens, "do_sample": False},
        "process_results": process,
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
    }


def _accuracy_settings(_: Accuracy) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _likelihood_settings(suite: CrossEntropy | Perplexity) -> dict[str, Any]:
    def process(document: dict[str, Any], results: list[Any]) -> dict[str, float]:
        log_likelihood = results[0] if suite.text is not None else results[0][0]
        return {"score": -float(log_likelihood) / document["size"]}

    return {
        "output_type": "loglikelihood_rolling" if suite.text is not None else "loglikelihood",
        "process_results": process,
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": False}],
    }


_TASK_SETTINGS: dict[type, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(get_args(Answering), _answering_settings),
    Accuracy: _accuracy_settings,
    CrossEntropy: _likelihood_settings,
    Perplexity: _likelihood_settings,
}


def _answered(suite: FileSuite, item: SuiteItem, sample: dict[str, Any]) -> Answered:
    if isinstance(suite, Accuracy):
        return _chosen(suite, item, [float(response[0]) for response in sample["filtered_resps"]])
    if isinstance(suite, CrossEntropy | Perplexity):
        score, size = float(sample["score"]), float(sample["doc"]["size"])
        return Answered(item.prompt, item.completion, f"{score:.4f} {NATS[suite.metric]}", score, size)
    answer = str(sample["filtered_resps"][0])
    worth = worth_of(suite, answer, item.completion)
    chance = 1 / len(suite.labels) if isinstance(suite, Classification) else 0.0
    return Answered(item.prompt, item.completion, answer, worth.score, 1.0, chance, worth.readable)


def _chosen(suite: Accuracy, item: SuiteItem, likelihoods: list[float]) -> Answered:
    """The likeliest choice, after division by its bytes where the suite normalises."""
    if suite.normalise == "bytes":
        likelihoods = [value / len(choice.encode()) for value, choice in zip(likelihoods, item.choices, strict=True)]
    chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    score = float(chosen == item.right)
    return Answered(item.prompt, item.completion, item.choices[chosen], score, 1.0, 1 / len(item.choices))


def _probe(suites: tuple[FileSuite, ...], language_model: HarnessModel) -> list[dict[str, Any]]:
    """Teacher-forced log-probabilities of a few prompts, which the endpoint must agree with before it is used."""
    import torch

    model, tokenizer = language_model.model, language_model.tokenizer
    probes = []
    for ids, where in _probe_ids(suites, tokenizer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -len(ids) :].float()
        given = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:], device=logits.device)[:, None])
        if not bool(given.isfinite().all()):
            raise fail("the model's log-probabilities are not finite numbers", where, _DIVERGED)
        probes.append({"token_ids": ids, "log_probs": given[:, 0].tolist()})
    return probes


def _probe_ids(suites: tuple[FileSuite, ...], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], str]]:
    """The first item of a few suites; a sentence where all suites are tasks of the harness."""
    for suite in suites[:PROBE_PROMPTS]:
        item = read_items(suite.model_copy(update={"limit": 1}))[0]
        rendered = render_item(suite, item, tokenizer)
        ids = context_ids(suite, rendered.prompt, tokenizer) + text_ids(tokenizer, rendered.target)
        yield ids[:PROBE_TOKENS], item.where
    if not suites:
        yield text_ids(tokenizer, _PROBE_SENTENCE)[:PROBE_TOKENS], "a sentence"
