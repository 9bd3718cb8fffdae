"""An adapter that is switched off gives back the base, whatever the method, and comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from test_tuning import TUNINGS

from training.data.batches import collate
from training.data.encoding import Encoded
from training.objective.objectives import switched_off
from training.objective.targets import TargetLogits
from training.strategy import Tuning, is_adapter, moves_base
from training.tuning import apply_tuning, load_base

BATCH = collate([Encoded((5, 9, 17, 33, 45), (False,) + (True,) * 4), Encoded((5, 44, 8), (False, True, True))], 0)


class Engine:
    """A model where the loop has DeepSpeed's engine around it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.eval, self.train = module.eval, module.train

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.fixture(scope="module")
def base_logits(tiny_model: Path) -> torch.Tensor:
    base = load_base(tiny_model, torch.float32).eval()
    with torch.no_grad():
        return TargetLogits(base).targets(base, BATCH).logits


def of_name(name: str) -> Any:
    return TypeAdapter(Tuning).validate_python(TUNINGS[name])


@pytest.mark.parametrize("name", [name for name in TUNINGS if is_adapter(of_name(name))])
def test_every_adapter_gives_back_the_base_or_is_known_not_to(
    tiny_model: Path, base_logits: torch.Tensor, name: str
) -> None:
    """Of those that start from a changed base, the base is asked before the run instead."""
    model = apply_tuning(load_base(tiny_model, torch.float32), of_name(name))
    head, engine = TargetLogits(model), Engine(model)
    generator = torch.Generator().manual_seed(0)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in moving:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
        engine.eval()
        on = head.targets(engine, BATCH).logits
        engine.train()
        with switched_off(engine):
            off = head.targets(engine, BATCH).logits
        assert model.training
        engine.eval()
        again = head.targets(engine, BATCH).logits
    assert (on - base_logits).abs().max() > 1e-3, "the adapter must do something for this to show anything"
    assert torch.equal(on, again)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in moving]
    assert ((off - base_logits).abs().max() < 1e-5) != moves_base(of_name(name))
