"""The engine of one worker against DeepSpeed's at ZeRO 1: the same losses, weights, checkpoints and protections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, losses, run_of, start_job, train_here, weights

from training import engine as engines
from training.protection.onepass import OnePassAdamW
from training.workspace import read_json

BF16 = STEPS | {"precision": "bf16", "max_steps": 12}
TUNINGS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "rank": 4, "alpha": 8}}


def trained(folder: Path, model: Path, zero: int, tuning: str, **other: Any) -> dict[str, Any]:
    training = BF16 | other.pop("training", {})
    job = start_job(folder, model, zero=zero, tuning=TUNINGS[tuning], training=training, **other)
    train_here(job).engine.destroy()
    return job


def expect_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-2)
    assert len(losses(one)) == 12
    for key, value in weights(other).items():
        torch.testing.assert_close(weights(one)[key], value, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize(("tuning", "micro"), [("full", 8), ("full", 2), ("lora", 8)])
def test_what_deepspeed_trains_it_trains(
    one_process: None, tiny_model: Path, tmp_path: Path, tuning: str, micro: int
) -> None:
    """With and without accumulation, with clipping that takes hold."""
    training = {"micro_batch_size": micro, "max_grad_norm": 0.5}
    jobs = [trained(tmp_path / str(zero), tiny_model, zero, tuning, training=training) for zero in (0, 1)]
    expect_alike(*jobs)


def test_one_pass_is_what_torchs_adamw_does(
    one_process: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, protections included."""
    protections = {"protections": [{"type": "l2sp", "strength": 0.5}, {"type": "si", "strength": 0.1, "record": True}]}
    hooked = trained(tmp_path / "hooks", tiny_model, 0, "full", amend=protections)

    def build(model: torch.nn.Module, spec: Any) -> torch.optim.Optimizer:
        moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decay = spec.training.weight_decay
        return OnePassAdamW([{"params": moving, engines.RATE_RATIO: 1.0}], lr=1e-3, weight_decay=decay)

    monkeypatch.setattr(engines, "build_optimizer", build)
    fused = trained(tmp_path / "fused", tiny_model, 0, "full", amend=protections)
    expect_alike(fused, hooked)


def test_a_checkpoint_of_it_goes_on_with_deepspeed(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", tiny_model, 0, "full", training={"checkpoint_every_steps": 6})
    newest = run_of(whole).checkpoints / "step-0000006"
    assert read_json(newest / "manifest.json")["step"] == 6
    for later in run_of(whole).checkpoints.glob("step-0000012"):
        later.rename(later.with_name("gone"))
    whole["spec"]["scaling"]["zero_stage"] = whole["plan"]["zero_stage"] = 1
    before = weights(whole)
    (run_of(whole).artifact).rename(run_of(whole).path / "first")
    train_here(whole).engine.destroy()
    for key, value in before.items():
        torch.testing.assert_close(weights(whole)[key], value, atol=2e-3, rtol=1e-2)
