"""Protections of LoRA act on what the adapter adds to the base, s BA, and not on A and B apart (arXiv 2602.17559)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from training.protection.layout import Layout
from training.protection.protections import stepped
from training.tuning import ADAPTER

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """A linear module with its LoRA: the base weight's name, the names of A and B, and the factor s.

    `is_transposed` says that the base weight is stored (in, out).
    """

    weight: str
    a: str
    b: str
    scaling: float
    is_transposed: bool


def adapted_modules(model: Any) -> list[Adapted]:
    """Every module that LoRA adapts, in the model's order."""
    return [
        Adapted(
            weight=f"{name.removeprefix(_PEFT_PREFIX)}.weight",
            a=f"{name}.lora_A.{ADAPTER}.weight",
            b=f"{name}.lora_B.{ADAPTER}.weight",
            scaling=module.scaling[ADAPTER],
            is_transposed=bool(getattr(module, "fan_in_fan_out", False)),
        )
        for name, module in model.named_modules()
        if ADAPTER in getattr(module, "lora_A", {})
    ]


class ProductPull:
    """Adds the gradient of strength/2 sum_ij w_ij (s BA - s B_0 A_0)_ij^2 to those of A and B.

    Modules are dealt out to the workers: each holds the weights w of its own modules, and the gradients are summed.

    Args:
        read: the whole w of a base weight by name, shaped as it is stored there; None for w = 1.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        *,
        strength: float,
        read: Callable[[str], torch.Tensor] | None,
    ) -> None:
        self._layout, self._strength = layout, strength
        modules = adapted_modules(model)
        self._names = [name for module in modules for name in (module.a, module.b)]
        self._mine = modules[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else modules
        self._weights = {module.weight: self._oriented(module, read(module.weight)) for module in self._mine if read}
        self._start = {name: value.clone() for name, value in self._gathered().items()}
        self._waiting: dict[int, torch.Tensor] = {}
        optimizer.register_step_pre_hook(self._add_gradient)

    def _oriented(self, module: Adapted, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (out, in), where this worker's shards are."""
        return (weight.T if module.is_transposed else weight).to(self._layout.device, torch.float32)

    def _gathered(self) -> dict[str, torch.Tensor]:
        return self._layout.gather(list(self._layout.masters), self._names)

    @torch.no_grad()
    def _add_gradient(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step may come in several calls, one a sub-group; all use the weights from before its first."""
        for index, master in stepped(self._layout, optimizer):
            if index not in self._waiting:
                self._waiting = dict(enumerate(self._gradients()))
            assert master.grad is not None
            master.grad.add_(self._waiting.pop(index).to(master.grad.dtype))

    def _gradients(self) -> list[torch.Tensor]:
        """The penalty's gradient in the shape of the shards."""
        whole = self._gathered()
        gradients = {name: torch.zeros_like(value) for name, value in whole.items()}
        for module in self._mine:
            a, b = whole[module.a], whole[module.b]
            change = b @ a - self._start[module.b] @ self._start[module.a]
            force = change * (self._strength * module.scaling**2)
            force = force * self._weights[module.weight] if self._weights else force
            gradients[module.a], gradients[module.b] = b.T @ force, force @ a.T
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gradients[name].reshape(-1) for name in self._names])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [gradients[name].numel() for name in self._names])
            gradients = dict(zip(self._names, pieces, strict=True))
        sheet = self._layout.zeros()

        def read(name: str, start: int, end: int) -> torch.Tensor:
            gradient = gradients.get(name)
            return torch.zeros(end - start) if gradient is None else gradient.reshape(-1)[start:end]

        self._layout.spread(read, sheet)
        return sheet
