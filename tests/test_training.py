"""The training loop on Ray Train and DeepSpeed against itself at other scales, and against plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from jobs import (
    STEPS,
    TUNINGS,
    JobValues,
    dtypes_of,
    losses,
    plan_of,
    rows_of,
    run_of,
    spec_of,
    start_job,
    train_here,
    train_in_group,
    weights,
)
from torch.nn import functional

from training.data.batches import Schedule
from training.data.prepare import load_prepared
from training.tuning import apply_tuning, load_base
from training.worker import seed_everything

Weights = dict[str, torch.Tensor]


def reference(job: JobValues) -> tuple[list[float], list[float], Weights]:
    """Losses, gradient norms and final weights of the job's spec in plain torch, one example at a time."""
    spec, plan = spec_of(job), plan_of(job)
    data = load_prepared(Path(job["prepared"])).train
    settings = spec.training
    seed_everything(settings.seed)
    model = apply_tuning(load_base(Path(spec.model), torch.float32), spec.tuning)
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    anchors = {name: parameter.detach().clone() for name, parameter in moving.items()}
    optimizer = torch.optim.AdamW(moving.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = Schedule(len(data), settings.global_batch_size, settings.epochs, settings.seed, settings.max_steps)
    curve, norms = [], []
    for step in range(plan.steps):
        batch = [data[index] for index in schedule.batch(step)]
        num_targets = sum(sum(example.is_target) for example in batch)
        loss = torch.zeros(())
        for example in batch:
            ids, wanted = torch.tensor([example.ids]), torch.tensor(example.is_target)[1:]
            log_probs = functional.log_softmax(model(ids).logits[0, :-1], dim=-1)
            loss = loss - log_probs.gather(1, ids[0, 1:, None])[:, 0][wanted].sum() / num_targets
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        curve.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(moving.values(), settings.max_grad_norm or math.inf)))
        for protection in spec.protections:
            for name, parameter in moving.items():
                assert parameter.grad is not None
                parameter.grad += protection.strength * (parameter.detach() - anchors[name])
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_factor(step, plan.steps)
        optimizer.step()
    return curve, norms, {name.replace(".default.", "."): moving[name].detach() for name in moving}


def rate_factor(step: int, steps: int) -> float:
    """Four steps of warm-up, then half a cosine (warmup_ratio 0.2 of 20 steps)."""
    return (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (steps - 4)))


def assert_same_weights(given: Weights, wanted: Weights) -> None:
    assert given.keys() == wanted.keys()
    assert farthest(given, wanted) < 1e-5


def farthest(given: Weights, wanted: Weights) -> float:
    return max((given[name] - wanted[name]).abs().max().item() for name in wanted)


@pytest.fixture(scope="module")
def references(two_workers: dict[str, JobValues]) -> dict[str, tuple[list[float], list[float], Weights]]:
    return {name: reference(two_workers[f"{name} fp32 0"]) for name in TUNINGS}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", TUNINGS)
def test_every_zero_stage_matches_plain_torch(
    two_workers: dict[str, JobValues],
    references: dict[str, tuple[list[float], list[float], Weights]],
    name: str,
    stage: int,
) -> None:
    job = two_workers[f"{name} fp32 {stage}"]
    curve, norms, final = references[name]
    assert losses(job) == pytest.approx(curve, abs=1e-4)
    assert min(norms) > 1, "clipping must be active for this to show that it is right"
    steps = [row for row in rows_of(run_of(job)) if row["kind"] == "step"]
    assert [row["grad_norm"] for row in steps] == pytest.approx(norms, rel=1e-4)
    assert_same_weights(weights(job), final)


def test_the_protection_and_the_data_are_what_the_parity_rests_on(two_workers: dict[str, JobValues]) -> None:
    """L2-SP must move the weights, rows must be uneven and the last batch short, or parity would show nothing."""
    assert farthest(weights(two_workers["l2sp fp32 0"]), weights(two_workers["full fp32 0"])) > 1e-3
    data = load_prepared(Path(two_workers["lora fp32 0"]["prepared"])).train
    assert len({len(example.ids) for example in data}) > 3
    assert len(data) % 8 == 5


@pytest.fixture(scope="module")
def four_workers(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobValues]:
    folder = tmp_path_factory.mktemp("four")
    jobs = {
        name: start_job(folder / name, tiny_model, workers=4, tuning=TUNINGS[name], training=STEPS)
        for name in ("lora", "full")
    }
    train_in_group(list(jobs.values()), 4, folder / "ray")
    return jobs


@pytest.mark.parametrize("name", ["lora", "full"])
def test_workers_and_accumulation_are_interchangeable(
    two_workers: dict[str, JobValues],
    four_workers: dict[str, JobValues],
    one_process: None,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
) -> None:
    alone = start_job(tmp_path, tiny_model, tuning=TUNINGS[name], training=STEPS)
    train_here(alone)
    for job, workers in ((alone, 1), (two_workers[f"{name} fp32 0"], 2), (four_workers[name], 4)):
        plan = plan_of(job)
        assert (plan.workers, plan.accumulation_steps, plan.micro_batch_size) == (workers, 4 // workers, 2)
        assert losses(job) == pytest.approx(losses(alone), abs=1e-4)
        assert_same_weights(weights(job), weights(alone))


@pytest.mark.parametrize("stage", range(1, 4))
@pytest.mark.parametrize("name", ["lora", "full"])
def test_bf16_trains_where_masters_are_kept(two_workers: dict[str, JobValues], name: str, stage: int) -> None:
    job = two_workers[f"{name} bf16 {stage}"]
    curve = losses(job)
    assert len(curve) == 20
    assert sum(curve[-6:]) / 6 < sum(curve[:6]) / 6 - 0.3
    assert all(tensor.isfinite().all() for tensor in weights(job).values())
    for rank in range(2):
        found = dtypes_of(job, rank)
        assert found["buffers"] == ["torch.float32"], "rotary frequencies lose positions in bf16"
        assert set(found["masters"]) == {"torch.float32"}


def test_training_reads_the_parameters_that_the_plan_counted(two_workers: dict[str, JobValues]) -> None:
    for name in ("lora", "full"):
        job = two_workers[f"{name} fp32 3"]
        assert sum(tensor.numel() for tensor in weights(job).values()) == plan_of(job).trainable_parameters
