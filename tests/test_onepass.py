"""The optimizer that pulls and records in its one pass, against torch's with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, spec_of, start_job, train_here, weights

from training import engine
from training.engine import build_optimizer
from training.protection.layout import Layout
from training.protection.onepass import OnePassAdamW
from training.protection.protections import PathIntegral, QuadraticPull
from training.spec import RunSpec

ONE_PULL = [{"type": "l2sp", "strength": 1.0}]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("updates", [("coupled",), ("proximal",), ("coupled", "proximal", "proximal")])
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_one_pass_optimizer_does_what_hooks_do(updates: tuple[str, ...], records: bool, device: str) -> None:
    steps = []
    for make in (torch.optim.AdamW, OnePassAdamW):
        generator = torch.Generator().manual_seed(3)
        shapes = {"a": (7, 5), "b": (3,)}
        values = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
        thetas = {name: value.requires_grad_() for name, value in values.items()}
        optimizer = make([{"params": list(thetas.values())}], lr=0.03, weight_decay=0.1)
        layout = Layout.of_parameters(thetas)
        path = PathIntegral(layout, optimizer, lambda: 2.0) if records else None
        for index, update in enumerate(updates):
            weights = [torch.rand(theta.shape, generator=generator).to(theta) for theta in layout.masters]
            given = None if index == 1 else [weight.to(torch.bfloat16) if index else weight for weight in weights]
            QuadraticPull(layout, optimizer, strength=0.5 + index, weights=given, update=update)
        for _ in range(12):
            for theta in thetas.values():
                theta.grad = torch.randn(theta.shape, generator=generator).to(theta)
            optimizer.step()
        moments = [optimizer.state[theta][name] for theta in layout.masters for name in ("exp_avg", "exp_avg_sq")]
        steps.append([*layout.masters, *moments, *(path.omega if path else ())])
    for hooked, fused in zip(*steps, strict=True):
        torch.testing.assert_close(fused.detach(), hooked.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_steps_it_as_it_steps_torchs(
    stage: int, one_process: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clipping, whose undoing the path needs, and with a checkpoint's sheets on the way."""
    ends = []
    for name in ("hooks", "one-pass"):
        training = STEPS | {"max_steps": 6, "max_grad_norm": 0.1, "checkpoint_every_steps": 3}
        protections = [{"type": "si", "strength": 0.1, "record": True}, {"type": "l2sp", "strength": 5.0}]
        job = start_job(
            tmp_path / name,
            tiny_model,
            tuning={"type": "full"},
            protections=protections,
            training=training,
            workers=1,
            zero=stage,
        )
        train_here(job)
        ends.append(weights(job))
        monkeypatch.setattr(engine, "build_optimizer", as_on_a_gpu)
    for weight, value in ends[0].items():
        torch.testing.assert_close(ends[1][weight], value, rtol=0, atol=1e-6)


def as_on_a_gpu(model: torch.nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return build_optimizer(model, spec)


@pytest.mark.parametrize(
    ("tuning", "protections", "is_one_pass"),
    [({"type": "full"}, ONE_PULL, True), ({"type": "full"}, [], False), ({"type": "lora"}, ONE_PULL, False)],
)
def test_pulls_on_whole_weights_are_one_pass_on_a_gpu(
    tuning: dict[str, Any], protections: list[dict[str, Any]], is_one_pass: bool, tiny_model: Path, tmp_path: Path
) -> None:
    job = start_job(tmp_path, tiny_model, tuning=tuning, protections=protections)
    model = torch.nn.Linear(2, 2)
    assert isinstance(as_on_a_gpu(model, spec_of(job)), OnePassAdamW) == is_one_pass
    assert not isinstance(build_optimizer(model, spec_of(job)), OnePassAdamW)
