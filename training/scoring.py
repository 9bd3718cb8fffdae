"""Scores one model on every suite with lm-evaluation-harness, in a process of its own.

Prompts are rendered here, by the code that training uses, and handed to the harness as plain text; so a suite's
tokens are the tokens of training and serving. Scores of a model under a protocol are cached by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.encoding import load_tokenizer
from training.errors import fail
from training.locations import hash_data
from training.models import hash_file, hash_folder
from training.rows import SuiteItem, read_items
from training.scorecard import Probe
from training.spec import Accuracy, CrossEntropy, ExactMatch, RunSpec
from training.suites import AnySuite, RenderedItem, context_ids, render_item
from training.tokens import text_ids
from training.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from training.harness import HarnessModel

PROBE_PROMPTS = 4
PROBE_TOKENS = 48
_SCORING_VERSION = 2
_DIVERGED = "the training diverged: lower training.learning_rate, or set training.precision: fp32"


@dataclass(frozen=True)
class ScoreJob:
    """What a scoring process is sent: the base, an adapter or a whole tuned model, and where to put the answer."""

    spec: dict[str, Any]
    base: str
    artifact: str | None
    is_adapter: bool
    target: str
    log: str


@dataclass(frozen=True)
class Answered:
    """An item's answer, its score, and its weight in the suite's mean (bytes for cross-entropy)."""

    prompt: str
    expected: str
    answer: str
    score: float
    weight: float


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
    for suite in spec.suites.all:
        settings = suite.model_dump(mode="json", exclude={"path", "min_gain", "max_loss", "inherited_from"})
        protocol[f"suite.{suite.name}"] = json.dumps(settings, sort_keys=True)
        protocol[f"data.{suite.name}"] = hash_data(suite.path)
    return protocol


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

    with output_to(Path(job.log)), explained_at(Path(job.log)), _alone():
        started = time.monotonic()
        spec = RunSpec.model_validate(job.spec)
        language_model = _load(job)
        suites = {suite.name: _score_suite(suite, language_model) for suite in spec.suites.all}
        probes = _probe(spec.suites.all, language_model)
        seconds = time.monotonic() - started
        answers = {name: [vars(answer) for answer in answers] for name, answers in suites.items()}
        write_json(Path(job.target), {"suites": answers, "probes": probes, "seconds": seconds})
    return seconds


@contextmanager
def _alone() -> Iterator[None]:
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


def scoring_precision(gpus: int) -> str:
    """The precision that serving uses on the same hardware: scores are of what will be served."""
    return "bfloat16" if gpus else "float32"


def _load(job: ScoreJob) -> HarnessModel:
    import torch

    from training.harness import HarnessModel

    gpu = torch.cuda.is_available()
    path = job.base if job.is_adapter or job.artifact is None else job.artifact
    return HarnessModel(
        pretrained=path,
        tokenizer=load_tokenizer(Path(job.base)),
        peft=job.artifact if job.is_adapter else None,
        dtype=scoring_precision(int(gpu)),
        device="cuda" if gpu else "cpu",
        batch_size=64 if gpu else 16,
        trust_remote_code=False,
    )


def _score_suite(suite: AnySuite, language_model: HarnessModel) -> list[Answered]:
    """Every item's answer, in order, from the harness's own sample log.

    The harness's `evaluate` is called below its `simple_evaluate`, which spends ten seconds describing the machine.
    """
    from lm_eval.evaluator import evaluate

    items = read_items(suite)
    language_model.suite = suite
    task = _harness_task(suite, [render_item(suite, item, language_model.tokenizer) for item in items])
    results = evaluate(language_model, {suite.name: task}, bootstrap_iters=0, log_samples=True)
    assert results is not None
    samples = sorted(results["samples"][suite.name], key=lambda sample: int(sample["doc_id"]))
    return [_answered(suite, item, sample) for item, sample in zip(items, samples, strict=True)]


def _harness_task(suite: AnySuite, rendered: list[RenderedItem]) -> Any:
    """The suite as a task of the harness, over documents that hold whole prompts."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    documents = datasets.Dataset.from_list([vars(item) | {"choices": list(item.choices)} for item in rendered])
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


def _exact_match_settings(suite: ExactMatch) -> dict[str, Any]:
    def process(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        given, wanted = results[0].strip(), document["target"].strip()
        same = given.lower() == wanted.lower() if suite.ignore_case else given == wanted
        return {"exact_match": float(same)}

    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": suite.max_new_tokens, "do_sample": False},
        "process_results": process,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _accuracy_settings(_: Accuracy) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _cross_entropy_settings(suite: CrossEntropy) -> dict[str, Any]:
    def process(document: dict[str, Any], results: list[Any]) -> dict[str, float]:
        log_likelihood = results[0] if suite.text is not None else results[0][0]
        return {"cross_entropy": -float(log_likelihood) / len(document["target"].encode())}

    return {
        "output_type": "loglikelihood_rolling" if suite.text is not None else "loglikelihood",
        "process_results": process,
        "metric_list": [{"metric": "cross_entropy", "aggregation": "mean", "higher_is_better": False}],
    }


_TASK_SETTINGS: dict[type, Callable[[Any], dict[str, Any]]] = {
    ExactMatch: _exact_match_settings,
    Accuracy: _accuracy_settings,
    CrossEntropy: _cross_entropy_settings,
}


def _answered(suite: AnySuite, item: SuiteItem, sample: dict[str, Any]) -> Answered:
    if isinstance(suite, ExactMatch):
        return Answered(item.prompt, item.completion, sample["filtered_resps"][0], sample["exact_match"], 1.0)
    if isinstance(suite, Accuracy):
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        return Answered(item.prompt, item.completion, item.choices[chosen], float(sample["acc"]), 1.0)
    score, num_bytes = sample["cross_entropy"], len(sample["doc"]["target"].encode())
    return Answered(item.prompt, item.completion, f"{score:.4f} nats per byte", score, float(num_bytes))


def _probe(suites: tuple[AnySuite, ...], language_model: HarnessModel) -> list[dict[str, Any]]:
    """Teacher-forced log-probabilities of a few prompts, which the endpoint must agree with before it is used."""
    import torch

    model, tokenizer = language_model.model, language_model.tokenizer
    probes = []
    for suite in suites[:PROBE_PROMPTS]:
        item = read_items(suite.model_copy(update={"limit": 1}))[0]
        rendered = render_item(suite, item, tokenizer)
        ids = (context_ids(suite, rendered.prompt, tokenizer) + text_ids(tokenizer, rendered.target))[:PROBE_TOKENS]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -len(ids) :].float()
        given = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:], device=logits.device)[:, None])
        if not bool(given.isfinite().all()):
            raise fail("the model's log-probabilities are not finite numbers", item.where, _DIVERGED)
        probes.append({"token_ids": ids, "log_probs": given[:, 0].tolist()})
    return probes
