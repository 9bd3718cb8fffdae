"""Every switch of the fast path against the plain path: the same losses, in fp32 over 20 steps and in bf16 over 50."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, JobValues, losses, run_of, start_job

from training.job import Job
from training.one_worker import OneWorker
from training.worker import Trainer

PLAIN: dict[str, Any] = {"packing": False, "fused_loss": False, "kernels": "none", "gradient_checkpointing": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "packing": {"packing": True, "max_length": 96},
    "fused_loss": {"fused_loss": True},
    "kernels": {"kernels": "compile"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
}


def stepped(folder: Path, model: Path, zero: int = 0, **training: Any) -> tuple[JobValues, Trainer]:
    """A full tuning after its last step, without an artifact."""
    keys = STEPS | {"micro_batch_size": 4, "max_length": 96} | PLAIN | training
    job = start_job(folder, model, zero=zero, tuning={"type": "full"}, training=keys)
    trainer = Trainer.start(Job(**job), run_of(job))
    while trainer.step < trainer.plan.steps:
        trainer.train_step()
    trainer.engine.destroy()
    return job, trainer


@pytest.fixture(scope="module")
def plain(one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job, trainer = stepped(tmp_path_factory.mktemp("plain"), tiny_model)
    assert (trainer.plan.row_tokens, trainer.objective.head.fuses, trainer.step) == (0, False, 20)
    return losses(job)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_no_loss(
    name: str, plain: list[float], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler captures and differentiates; its code generator is left out."""

    def capture(module: torch.nn.Module) -> None:
        vars(module)["_compiled_call_impl"] = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    job, trainer = stepped(tmp_path, tiny_model, **SWITCHES[name])
    layers = list(trainer.engine.module.model.layers)
    on = {
        "packing": trainer.plan.row_tokens > 0,
        "fused_loss": trainer.objective.head.fuses,
        "kernels": all(layer._compiled_call_impl is not None for layer in layers),
        "gradient_checkpointing": any(layer.gradient_checkpointing for layer in layers),
    }
    assert [switch for switch, is_on in on.items() if is_on] == [name]
    assert losses(job) == pytest.approx(plain, rel=1e-4)


def test_one_worker_without_deepspeed_loses_as_with_it(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    keys = {"precision": "bf16", "epochs": 10, "max_steps": 50, "learning_rate": 1e-4}
    fast, trainer = stepped(tmp_path / "fast", tiny_model, 0, **keys)
    slow, _ = stepped(tmp_path / "slow", tiny_model, 1, **keys)
    assert isinstance(trainer.engine, OneWorker)
    assert len(losses(slow)) == 50
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-2)
