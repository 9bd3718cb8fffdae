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
from jobs import (
    STEPS,
    TUNINGS,
    JobValues,
    losses,
    plan_of,
    rows_of,
    run_of,
    spec_of,
    start_job,
    train_here,
    train_in_group,
    uneven_rows,
    weights,
)
from plain import BatchLoss, Plain, farthest, target_logits, train_plainly
from tiny import make_tiny_model

from training.data.batches import Schedule
from training.data.encoding import Encoded
from training.data.prepare import Prepared, load_prepared
from training.job import Job
from training.objective.objectives import DpoObjective, TokenObjective, Totals, switched_off
from training.objective.targets import TargetLogits, Targets
from training.objective.weighing import Weighed
from training.spec import RunSpec
from training.tuning import load_base
from training.worker import Trainer

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


def close(name: str) -> float:
    """Adam makes steps of full size of gradients that are next to nothing, and of their rounding: 1e-3 a step."""
    return 1e-5 if CASES[name].protections else 2e-5


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
    assert farthest(weights(job), plain.weights) < close(name)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.protections])
def test_one_worker_matches_plain_torch_too(
    one_process: None,
    tiny_model: Path,
    teacher: Path,
    references: dict[str, Plain],
    name: str,
    stage: int,
    tmp_path: Path,
) -> None:
    job = start_case(tmp_path, tiny_model, teacher, CASES[name], zero=stage, training=QUICK)
    train_here(job).engine.destroy()
    assert farthest(weights(job), references[name].weights) < close(name)


def steps(job: JobValues) -> list[dict[str, Any]]:
    return [row for row in rows_of(run_of(job)) if row["kind"] == "step"]


def test_what_is_compared_is_logged(jobs: Jobs) -> None:
    for name in ("kl adapter", "kl full"):
        kl = [row["kl"] for row in steps(jobs[name, 3])]
        assert kl[0] == pytest.approx(0, abs=1e-6), "the tuned model is the base before its first step"
        assert min(kl[1:]) > 1e-6
        assert kl[-1] > 1e-3
        for row in steps(jobs[name, 3]):
            assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.7 * 1.5**2 * row["kl"], rel=1e-5)
    for row in steps(jobs["distill online", 2]):
        assert row["loss"] == pytest.approx(0.4 * row["cross_entropy"] + 0.6 * 4 * row["divergence"], rel=1e-5)
    for name in ("dpo adapter", "dpo full"):
        rows = steps(jobs[name, 1])
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-4)
        assert all(row["accuracy"] * 8 % 1 in (0, 1) or row["accuracy"] * 5 % 1 < 1e-5 for row in rows)
        assert rows[-1]["margin"] > 0.05
        assert rows[-1]["accuracy"] > 0.6
    assert not {"kl", "cross_entropy", "accuracy"} & steps(jobs["stm", 0])[0].keys()


def test_the_counts_of_a_step_are_those_of_what_it_learned(jobs: Jobs) -> None:
    data = load_prepared(Path(jobs["dpo full", 0]["prepared"]))
    indices = schedule_of(jobs["dpo full", 0]).batch(0)
    rows = [row for index in indices for row in (data.train[index], data.rejected[index])]
    first = steps(jobs["dpo full", 0])[0]
    assert first["num_tokens"] == sum(len(row.ids) for row in rows)
    assert first["num_target_tokens"] == sum(sum(row.is_target) for row in rows)
    masked = sum(row["num_target_tokens"] for row in steps(jobs["stm", 0]))
    whole = sum(row["num_target_tokens"] for row in steps(jobs["kl adapter", 0]))
    assert 0.2 * whole < masked < 0.8 * whole


def schedule_of(job: JobValues) -> Schedule:
    settings, plan = spec_of(job).training, plan_of(job)
    return Schedule(plan.num_examples, settings.global_batch_size, settings.epochs, settings.seed, settings.max_steps)


def test_every_text_is_learned_whole(jobs: Jobs) -> None:
    """Pieces of at most 64 tokens: every byte of every text and its end token is a target once, less the first."""
    data = load_prepared(Path(jobs["lm", 0]["prepared"])).train
    texts = [row["text"] for row in uneven_rows(45)]
    assert max(len(row.ids) for row in data) == 64
    assert len(data) > 45
    assert sum(row.num_targets for row in data) == sum(len(text.encode()) for text in texts)
    assert plan_of(jobs["lm", 0]).num_overlong == sum(len(text.encode()) + 1 > 64 for text in texts) > 0


# ------------------------------------------------------------------------------------------- one process, few steps

FEW = QUICK | {"max_steps": 5}


def train_case(folder: Path, model: Path, teacher: Path, case: Case) -> JobValues:
    job = start_case(folder, model, teacher, case, training=FEW)
    train_here(job)
    return job


def test_top_k_of_the_whole_vocabulary_is_the_teacher_itself(
    one_process: None, tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        settings = {**DISTILL, "divergence": kind, "beta": 0.3}
        online = train_case(tmp_path / kind / "a", tiny_model, teacher, Case("lora", online_jsd, settings))
        cached = train_case(
            tmp_path / kind / "b", tiny_model, teacher, Case("lora", online_jsd, {**settings, "top_k": 259})
        )
        assert losses(cached) == pytest.approx(losses(online), abs=1e-5)
        assert farthest(weights(cached), weights(online)) < 1e-5


def test_stm_that_masks_nothing_and_flow_that_weighs_alike_are_plain_training(
    one_process: None, tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    plain = train_case(tmp_path / "plain", tiny_model, teacher, Case("full", plain_lm))
    everything = Case("full", plain_lm, protections=({"type": "stm", "threshold": 1e30},))
    assert losses(train_case(tmp_path / "stm", tiny_model, teacher, everything)) == losses(plain)
    alike = Case("full", plain_lm, protections=({"type": "flow", "temperature": 1e9},))
    assert losses(train_case(tmp_path / "flow", tiny_model, teacher, alike)) == pytest.approx(losses(plain), abs=1e-5)


def test_protections_of_the_loss_go_together(
    one_process: None, tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    """Distillation from a cached teacher with kl to the base, flow and stm, against plain torch."""
    protections = ({**KL, "top_k": 6}, {"type": "flow"}, {"type": "stm", "threshold": THRESHOLD})
    case = Case("full", all_together, {**DISTILL, "top_k": 5}, protections)
    job = train_case(tmp_path, tiny_model, teacher, case)
    assert losses(job) == pytest.approx(train_plainly(job, all_together(spec_of(job))).losses, abs=1e-4)


def all_together(spec: RunSpec) -> BatchLoss:
    base, other = frozen(spec.model), frozen(spec.objective.teacher)  # type: ignore[union-attr]
    means: dict[int, float] = {}

    def loss(model: Model, data: Prepared, indices: list[int]) -> torch.Tensor:
        means.update(means or {i: cross_entropies(base, row).mean().item() for i, row in enumerate(data.train)})
        weighed, alike, total, count = torch.zeros(()), torch.zeros(()), 0.0, 0
        for index in indices:
            row = data.train[index]
            kept = cross_entropies(base, row).exp() <= THRESHOLD
            weight = math.exp(-means[index] / statistics.median(means.values()))
            per_target = 0.4 * cross_entropies(model, row) + 0.6 * 4 * bucketed_kl(other, model, row, 5, 2.0)
            weighed = weighed + weight * per_target[kept].sum()
            alike = alike + bucketed_kl(base, model, row, 6, 1.5)[kept].sum()
            total, count = total + weight * int(kept.sum()), count + int(kept.sum())
        return weighed / total + 0.7 * 1.5**2 * alike / count

    return loss


def test_the_adapter_moves_and_drops_out_as_before_it_was_switched_off(
    one_process: None, tiny_model: Path, tmp_path: Path
) -> None:
    tuning = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.5}
    job = start_job(tmp_path, tiny_model, tuning=tuning, training=FEW, protections=[KL])
    trainer = Trainer.start(Job(**job), run_of(job))
    module = trainer.engine.module
    moving = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    trainer.engine.train()
    with switched_off(trainer.engine):
        assert not module.training
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == moving
    assert module.training
    trainer.run()
    assert any(tensor.abs().max() > 1e-4 for name, tensor in weights(job).items() if "lora_B" in name)


class Fixed(TargetLogits):
    """A head that predicts what it was told to."""

    def __init__(self, targets: Targets) -> None:
        self._targets, self.fuses = targets, False

    def targets(self, model: Any, batch: Any) -> Targets:
        return self._targets


class Engine:
    device = torch.device("cpu")


def test_dpo_of_two_pairs_by_hand() -> None:
    """Answers of one or two tokens over a vocabulary of two; the reference gives log 1/2 a token."""
    data = Prepared(train=(row_of(2), row_of(1)), rejected=(row_of(1), row_of(1)), validation={}, num_overlong=0)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0], [1.0, 0.0]], requires_grad=True)
    ids = torch.tensor([1, 0, 0, 0, 0])
    targets = Targets(logits, ids, torch.tensor([0, 0, 1, 2, 3]))

    def reference(engine: Any, batch: Any, sequences: Any) -> torch.Tensor:
        assert list(sequences) == [0, 1, 2, 3], "the chosen answers, then the rejected"
        return -math.log(2) * torch.tensor([2.0, 1.0, 1.0, 1.0])

    objective = DpoObjective(Fixed(targets), Weighed(data), 0, 0.5, reference)
    totals = objective.totals([0, 1])
    assert (totals.num_targets, totals.weight) == (5, 2.0)
    loss = objective.loss(Engine(), [0, 1], totals)

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    two = math.log(2)
    first = 0.5 * ((log_sigmoid(1.0) + log_sigmoid(2.0) + 2 * two) - (log_sigmoid(-3.0) + two))
    second = 0.5 * ((-two + two) - (log_sigmoid(1.0) + two))
    assert loss.value.item() == pytest.approx(-(log_sigmoid(first) + log_sigmoid(second)) / 2)
    assert loss.parts["margin"].item() == pytest.approx((first + second) / 2)
    assert loss.parts["accuracy"].item() == 0.5
    # d loss / d margin = -(1 - sigmoid(margin)) / 2, and d margin / d logit = beta (1 - p) for a chosen token's own.
    (gradient,) = torch.autograd.grad(loss.value, logits)
    own = 1 - math.exp(log_sigmoid(1.0))
    assert gradient[0, 1].item() == pytest.approx(-(1 - math.exp(log_sigmoid(first))) / 2 * 0.5 * own)


def row_of(num_targets: int) -> Encoded:
    return Encoded((0,) * (num_targets + 1), (False,) + (True,) * num_targets)


def test_a_micro_batch_without_examples_gives_a_zero_with_gradients() -> None:
    logits = torch.randn(1, 4, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    head = Fixed(Targets(logits, nothing, nothing))
    data = Weighed(Prepared((row_of(1),), {}, 0))
    for objective in (
        TokenObjective(head, data, 0, 1.0, ()),  # type: ignore[arg-type]
        DpoObjective(head, data, 0, 0.1, lambda *_: torch.zeros(0)),  # type: ignore[arg-type]
    ):
        loss = objective.loss(Engine(), [], Totals(3, 3.0))
        (gradient,) = torch.autograd.grad(loss.value, logits)
        assert loss.value.item() == 0
        assert (gradient == 0).all()
        assert list(loss.parts) == list(objective.names)
