"""Layers run again for the backward pass: the same weights, whatever tuning, stage and layout of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, losses, start_job, train_here, weights
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaAttention

from training import tuning
from training.errors import TenureError

TUNINGS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "rank": 4, "alpha": 8}}


def trained(folder: Path, model: Path, name: str, zero: int, **training: Any) -> tuple[Any, list[float], int]:
    """Weights, losses, and how often a layer was run."""
    job = start_job(folder, model, zero=zero, tuning=TUNINGS[name], training={**STEPS, "max_steps": 3, **training})
    ran: list[bool] = []
    hook = register_module_forward_hook(lambda module, *_: ran.append(is_trained_layer(module)))
    try:
        train_here(job).engine.destroy()
    finally:
        hook.remove()
    return weights(job), losses(job), sum(ran)


def is_trained_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, LlamaAttention) and module.training


@pytest.mark.parametrize(
    ("name", "zero", "packing"),
    [("full", 0, True), ("full", 2, False), ("full", 3, True), ("lora", 1, True), ("lora", 3, False)],
)
def test_the_same_weights_come_of_it(
    one_process: None, tiny_model: Path, tmp_path: Path, name: str, zero: int, packing: bool
) -> None:
    plain, plain_losses, once = trained(tmp_path / "plain", tiny_model, name, zero, packing=packing)
    again, again_losses, twice = trained(
        tmp_path / "again", tiny_model, name, zero, packing=packing, gradient_checkpointing=True
    )
    assert again_losses == pytest.approx(plain_losses, abs=1e-6)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=0)
    assert twice == 2 * once > 0


def test_a_model_that_cannot_is_refused() -> None:
    with pytest.raises(TenureError, match="Linear cannot run its layers again"):
        tuning.recompute(torch.nn.Linear(2, 2), 0)
