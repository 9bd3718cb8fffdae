"""A run that changes its number of workers and its ZeRO stage on the way learns what it would have learnt."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, JobValues, losses, plan_of, run_of, spec_of, start_job, train_here, weights

from training.faults import output_to
from training.job import Job
from training.worker import Trainer

TRAINING: dict[str, Any] = STEPS | {"global_batch_size": 12, "micro_batch_size": "auto", "max_steps": 12, "epochs": 4}
STAGES = ((4, 3, 4), (2, 1, 8), (3, 2, 12))  # workers, ZeRO stage, the step that they go on to


@pytest.fixture(scope="module")
def moved(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobValues:
    """Four workers at ZeRO 3, then two at ZeRO 1, then three at ZeRO 2."""
    folder = tmp_path_factory.mktemp("moved")
    job = start_job(folder, tiny_model, tuning={"type": "full"}, training=TRAINING)
    for workers, zero, until in STAGES:
        go_on(job, workers, zero, until, folder / f"ray-{workers}")
    return job


def go_on(job: JobValues, workers: int, zero: int, until: int, storage: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    rows = 12 // workers
    plan = replace(plan_of(job), workers=workers, zero_stage=zero, micro_batch_size=rows, accumulation_steps=1)
    TorchTrainer(
        train_until,
        train_loop_config={"job": {**job, "plan": vars(plan)}, "until": until},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1.0}),
        run_config=RunConfig(name="group", storage_path=str(storage)),
    ).fit()


def train_until(config: dict[str, Any]) -> None:
    """Go on from the newest checkpoint to a step, and leave one; at the end the artifact."""
    import torch.distributed as dist

    run = run_of(config["job"])
    with output_to(run.logs / f"worker-{dist.get_rank()}.log"):
        trainer = Trainer.start(Job(**config["job"]), run)
        while trainer.step < config["until"]:
            trainer.train_step()
        trainer._save()
        if trainer.step == trainer.plan.steps:
            trainer.finish()
        trainer.saver.finish()
        trainer.engine.destroy()
    gc.collect()


def test_workers_and_stages_change_and_the_losses_go_on(
    moved: JobValues, one_process: None, tiny_model: Path, tmp_path: Path
) -> None:
    alone = start_job(tmp_path, tiny_model, tuning={"type": "full"}, training=TRAINING)
    train_here(alone)
    assert spec_of(moved).training == spec_of(alone).training
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-4, abs=1e-4)
    given, wanted = weights(moved), weights(alone)
    assert max(float((given[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4
    assert all(torch.isfinite(value).all() for value in given.values())
