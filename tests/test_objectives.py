"""Objectives and what rests on a frozen model, on two workers at every ZeRO stage against plain torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, TUNINGS, JobValues, losses, spec_of, start_job, train_in_group, weights
from plain import BatchLoss, Plain, farthest, target_logits, train_plainly
from tiny import make_tiny_model

from training.encoding import Encoded
from training.prepare import Prepared
from training.spec import RunSpec
from training.tuning import load_base

Model = torch.nn.Module
PAIRS = {"path": "train.jsonl", "prompt": "question", "chosen": "answer", "rejected": "wrong"}
TEXTS = {"path": "train.jsonl", "text": "text"}


# ------------------------------------------------------------------------------- losses in plain torch, by hand


def frozen(folder: str) -> Model:
    return load_base(Path(folder), torch.float32).eval().requires_grad_(False)


def cross_entropies(model: Model, row: Encoded) -> torch.Tensor:
    logits, ids = target_logits(model, row)
    return -logits.softmax(-1).gather(1, ids[:, None])[:, 0].log()


def mean_cross_entropy(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
    return torch.cat([cross_entropies(model, data.train[index]) for index in indices]).mean()


def dpo(spec: RunSpec) -> BatchLoss:
    base = frozen(spec.model)

    def log_ratio(model: Model, row: Encoded) -> torch.Tensor:
        return cross_entropies(base, row).sum() - cross_entropies(model, row).sum()

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        margins = [log_ratio(model, data.train[i]) - log_ratio(model, data.rejected[i]) for i in indices]
        return -torch.stack([torch.sigmoid(0.5 * margin).log() for margin in margins]).mean()

    return loss


def online_jsd(spec: RunSpec) -> BatchLoss:
    """0.6 of the Jensen-Shannon divergence with beta 0.3 at temperature 2, 0.4 of the cross-entropy."""
    teacher = frozen(spec.objective.teacher)  # type: ignore[union-attr]

    def divergence(model: Model, row: Encoded) -> torch.Tensor:
        p = (target_logits(teacher, row)[0] / 2).softmax(-1)
        q = (target_logits(model, row)[0] / 2).softmax(-1)
        m = 0.3 * p + 0.7 * q
        return (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        mean = torch.cat([divergence(model, data.train[index]) for index in indices]).mean()
        return 0.6 * 4 * mean + 0.4 * mean_cross_entropy(model, data, indices)

    return loss


def bucketed_kl(frozen_model: Model, model: Model, row: Encoded, top_k: int, temperature: float) -> torch.Tensor:
    """KL(frozen||model) over the frozen model's likeliest tokens and one bucket for the rest."""
    p = (target_logits(frozen_model, row)[0] / temperature).softmax(-1)
    q = (target_logits(model, row)[0] / temperature).softmax(-1)
    p, order = p.sort(dim=-1, descending=True)
    q = q.gather(1, order)
    if top_k < p.shape[1]:
        p, q = (torch.cat([x[:, :top_k], x[:, top_k:].sum(-1, keepdim=True)], dim=1) for x in (p, q))
    return (p * (p / q).log()).sum(-1)


def cached_forward(spec: RunSpec) -> BatchLoss:
    teacher = frozen(spec.objective.teacher)  # type: ignore[union-attr]

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        mean = torch.cat([bucketed_kl(teacher, model, data.train[i], 5, 2.0) for i in indices]).mean()
        return 0.6 * 4 * mean + 0.4 * mean_cross_entropy(model, data, indices)

    return loss


def kl_to_base(top_k: int) -> Callable[[RunSpec], BatchLoss]:
    def of_spec(spec: RunSpec) -> BatchLoss:
        base = frozen(spec.model)

        def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
            mean = torch.cat([bucketed_kl(base, model, data.train[i], top_k, 1.5) for i in indices]).mean()
            return mean_cross_entropy(model, data, indices) + 0.7 * 1.5**2 * mean

        return loss

    return of_spec


def flow(spec: RunSpec) -> BatchLoss:
    base = frozen(spec.model)
    known: dict[int, float] = {}

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        known.update(known or {i: cross_entropies(base, row).mean().item() for i, row in enumerate(data.train)})
        temperature = statistics.median(known.values())
        shares = [math.exp(-known[i] / temperature) for i in indices]
        weighed = [share * cross_entropies(model, data.train[i]) for share, i in zip(shares, indices, strict=True)]
        counts = [data.train[i].num_targets for i in indices]
        return torch.cat(weighed).sum() / sum(n * share for n, share in zip(counts, shares, strict=True))

    return loss


def stm(spec: RunSpec) -> BatchLoss:
    base = frozen(spec.model)

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        rows = [data.train[index] for index in indices]
        kept = torch.cat([cross_entropies(base, row).exp() <= THRESHOLD for row in rows])
        return torch.cat([cross_entropies(model, row) for row in rows])[kept].mean()

    return loss


def plain_lm(spec: RunSpec) -> BatchLoss:
    return mean_cross_entropy


# A random model's perplexities on these rows range from 1 to 10^6: this masks about half the targets.
THRESHOLD = 2000.0


@dataclass(frozen=True)
class Case:
    """One strategy: its sections of the spec and its loss in plain torch."""

    tuning: str
    loss: Callable[[RunSpec], BatchLoss]
    objective: dict[str, Any] | None = None
    protections: tuple[dict[str, Any], ...] = ()
    source: dict[str, Any] | None = None


DISTILL = {"type": "distill", "temperature": 2.0, "weight": 0.6}
KL = {"type": "kl", "strength": 0.7, "temperature": 1.5}
CASES = {
    "lm": Case("full", plain_lm, {"type": "lm"}, source=TEXTS),
    "dpo adapter": Case("lora", dpo, {"type": "dpo", "beta": 0.5}, source=PAIRS),
    "dpo full": Case("full", dpo, {"type": "dpo", "beta": 0.5}, source=PAIRS),
    "distill online": Case("full", online_jsd, {**DISTILL, "divergence": "jsd", "beta": 0.3}),
    "distill cached": Case("full", cached_forward, {**DISTILL, "top_k": 5}),
    "kl adapter": Case("lora", kl_to_base(259), protections=(KL,)),
    "kl full": Case("full", kl_to_base(6), protections=({**KL, "top_k": 6},)),
    "flow": Case("full", flow, protections=({"type": "flow"},)),
    "stm": Case("lora", stm, protections=({"type": "stm", "threshold": THRESHOLD},)),
}
QUICK = STEPS | {"validation_items": 0}
Jobs = dict[tuple[str, int], JobValues]


def start_case(folder: Path, model: Path, teacher: Path, case: Case, **other: Any) -> JobValues:
    amend: dict[str, Any] = {}
    if case.objective:
        amend["objective"] = case.objective | ({"teacher": str(teacher)} if case.objective["type"] == "distill" else {})
    if case.source:
        amend["data"] = {"train": [case.source]}
    tuning, protections = TUNINGS[case.tuning], list(case.protections)
    return start_job(folder, model, tuning=tuning, protections=protections, amend=amend, **other)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "other", seed=3)


@pytest.fixture(scope="module")
def jobs(ray_cluster: None, tiny_model: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Every case on two workers at every ZeRO stage."""
    folder = tmp_path_factory.mktemp("objectives")
    made = {
        (name, stage): start_case(
            folder / f"{name}-{stage}", tiny_model, teacher, case, workers=2, zero=stage, training=QUICK
        )
        for name, case in CASES.items()
        for stage in range(4)
    }
    train_in_group(list(made.values()), 2, folder / "ray")
    return made


@pytest.fixture(scope="module")
def references(jobs: Jobs) -> dict[str, Plain]:
    return {name: train_plainly(jobs[name, 0], case.loss(spec_of(jobs[name, 0]))) for name, case in CASES.items()}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", CASES)
def test_every_objective_matches_plain_torch_at_every_zero_stage(
    jobs: Jobs, references: dict[str, Plain], name: str, stage: int
) -> None:
    job, plain = jobs[name, stage], references[name]
    assert losses(job) == pytest.approx(plain.losses, abs=1e-4)
    assert farthest(weights(job), plain.weights) < 1e-5
