"""Attaches a spec's protections to a worker's engine, and hands out what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.protection.importance import importance_sheet, open_importance, read_info, whole_importance
from training.protection.layout import Layout, Sheet, gather_to_first
from training.protection.product import ProductPull
from training.protection.protections import PathIntegral, QuadraticPull
from training.spec import RunSpec
from training.strategy import Ewc, L2sp, Lora, Si, records_path, updates_coupled

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Attached:
    """The protections of a run that act on its masters.

    `sheets` are what a checkpoint must hold of them; `path` is there when the run records synaptic intelligence.
    """

    layout: Layout
    sheets: dict[str, Sheet] = field(default_factory=dict)
    path: PathIntegral | None = None


def attach_all(
    spec: RunSpec, model: Any, layout: Layout, optimizer: torch.optim.Optimizer, aids: Mapping[str, str], unclip: Unclip
) -> Attached:
    """Hook every protection of the spec that acts on weights to the client optimizer.

    Args:
        model: the engine's module, its weights still those of the base.
        aids: the folder of each protection's importance, by the protection's type.
    """
    attached = Attached(layout)
    si = spec.protection(Si)
    if si is not None and records_path(si, spec.tuning):
        attached.path = PathIntegral(layout, optimizer, unclip)
        attached.sheets["si.omega"] = attached.path.omega
    for protection in spec.protections:
        if isinstance(protection, L2sp | Ewc | Si):
            importance = Path(aids[protection.type]) if protection.type in aids else None
            if importance is not None or isinstance(protection, L2sp):
                _pull(protection, spec, model, layout, optimizer, importance)
    return attached


Unclip = Callable[[], torch.Tensor | float]


def _pull(
    protection: L2sp | Ewc | Si,
    spec: RunSpec,
    model: Any,
    layout: Layout,
    optimizer: torch.optim.Optimizer,
    importance: Path | None,
) -> None:
    strength = protection.strength * (2 if isinstance(protection, Si) else 1)
    if isinstance(spec.tuning, Lora):
        read = _whole(importance, protection) if importance and not isinstance(protection, L2sp) else None
        ProductPull(model, layout, optimizer, strength=strength, read=read)
        return
    weights = None
    if importance is not None and not isinstance(protection, L2sp):
        weights = _weights(importance, protection, layout)
    update = "coupled" if updates_coupled(protection, spec.tuning) else "proximal"
    QuadraticPull(layout, optimizer, strength=strength, weights=weights, update=update)


def _weights(importance: Path, protection: Ewc | Si, layout: Layout) -> Sheet:
    """This rank's stretches of the importance, not negative, normalised as asked."""
    factor = read_info(importance).factor(protection.normalise)
    sheet = layout.zeros(_DTYPES[protection.stored])
    with open_importance(importance) as read:
        layout.spread(lambda name, start, end: read(name, start, end).clamp(min=0) * factor, sheet)
    return sheet


def _whole(importance: Path, protection: Ewc | Si) -> Callable[[str], torch.Tensor]:
    """A reader of the whole importance of one weight, normalised over all weights of the model."""
    factor = read_info(importance).factor(protection.normalise)
    return lambda name: whole_importance(importance, name).clamp(min=0) * factor


def path_importance(attached: Attached, xi: float, earlier: Path | None) -> tuple[dict[str, torch.Tensor], int]:
    """The importance of a recorded path, earlier tasks' added, on the first worker; and of how many tasks it is.

    All ranks call it.
    """
    assert attached.path is not None
    layout = attached.layout
    sheet, tasks = attached.path.importance(xi), 1
    if earlier is not None:
        past = importance_sheet(earlier, layout)
        sheet = [mine.add_(old) for mine, old in zip(sheet, past, strict=True)]
        tasks += read_info(earlier).tasks
    return gather_to_first(layout, sheet), tasks
