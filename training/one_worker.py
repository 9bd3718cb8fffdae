"""The engine of a run of one worker in bf16: fp32 masters without DeepSpeed's copies of gradients.

With nobody to share with, a step needs a gradient as the backward pass leaves it, the masters and their moments.
Gradients are gathered flat in bf16, or in fp32 where micro-batches are added up; clipping, AdamW and the rounding to
bf16 are one pass over them (training/protection/onepass.py). What others see of an engine is what DeepSpeed's has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from training.protection.onepass import Given, OnePassAdamW

# Where a parameter holds its fp32 master.
MASTER = "fp32_master"


@dataclass(frozen=True, eq=False)
class Flat:
    """A group's parameters end to end: their weights in bf16, which they are views of, masters, and gradients."""

    parameters: list[torch.nn.Parameter]
    weights: torch.Tensor
    master: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def of(cls, parameters: list[torch.nn.Parameter], gradients: torch.dtype) -> Flat:
        """Move the parameters' weights to one stretch."""
        weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        for parameter, start in zip(parameters, starts(parameters), strict=True):
            parameter.data = weights[start : start + parameter.numel()].view(parameter.shape)
        master = weights.float()
        for parameter, start in zip(parameters, starts(parameters), strict=True):
            vars(parameter)[MASTER] = master[start : start + parameter.numel()].view(parameter.shape)
        master.requires_grad_()
        return cls(parameters, weights, master, torch.zeros_like(weights, dtype=gradients))


def starts(parameters: list[torch.nn.Parameter]) -> Iterator[int]:
    """Where each of them begins, end to end."""
    start = 0
    for parameter in parameters:
        yield start
        start += parameter.numel()


class OneWorker:
    """A model in bf16 on this worker's device, with fp32 masters in the place of the optimizer's parameters.

    Args:
        accumulation: micro-batches of a step; their gradients are added up in fp32.
        max_norm: gradients are clipped to this norm, or not at all.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accumulation: int, max_norm: float | None
    ) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self.module = _in_bf16(model).to(self.device)
        self.optimizer = optimizer
        self._accumulation, self._max_norm = accumulation, max_norm
        self._taken = 0
        self._written: set[torch.nn.Parameter] = set()
        self._norm = torch.zeros((), device=self.device)
        dtype = torch.bfloat16 if accumulation == 1 else torch.float32
        self._flats = [_flatten(group, dtype) for group in optimizer.param_groups]
        self._hooks = [handle for flat in self._flats for handle in self._catch(flat)]

    def _catch(self, flat: Flat) -> Iterator[Any]:
        for parameter, start in zip(flat.parameters, starts(flat.parameters), strict=True):
            place = flat.gradient[start : start + parameter.numel()].view(parameter.shape)
            yield _after_gradient(parameter, self._catcher(place))

    def _catcher(self, place: torch.Tensor) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def catch(parameter: Any) -> None:
            if parameter in self._written:
                place.add_(parameter.grad)
            else:
                place.copy_(parameter.grad)
                self._written.add(parameter)
            parameter.grad = None

        return catch

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def train(self, mode: bool = True) -> None:
        """As of a module."""
        self.module.train(mode)

    def eval(self) -> None:
        """As of a module."""
        self.module.eval()

    def zero_optimization_stage(self) -> int:
        """Nothing is sharded."""
        return 0

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a micro-batch, of the mean over those of a step."""
        torch.autograd.backward(loss / self._accumulation)

    @torch.no_grad()
    def step(self) -> None:
        """Count a micro-batch, and with the last one make the step; none is made where gradients are not finite."""
        self._taken += 1
        if self._taken < self._accumulation:
            return
        self._taken = 0
        self._clear_missing()
        self._norm = torch.linalg.vector_norm(torch.stack([_norm(flat.gradient) for flat in self._flats]))
        if math.isfinite(float(self._norm)):
            self._update()
        self._written.clear()

    def _clear_missing(self) -> None:
        """Parameters that no loss of the step reached have no gradient, and not that of the step before."""
        for flat in self._flats:
            for parameter, start in zip(flat.parameters, starts(flat.parameters), strict=True):
                if parameter not in self._written:
                    flat.gradient[start : start + parameter.numel()].zero_()

    def _update(self) -> None:
        factor = torch.ones((), device=self.device)
        if self._max_norm is not None:
            factor = (self._max_norm / (self._norm + 1e-6)).clamp(max=1.0)
        if isinstance(self.optimizer, OnePassAdamW):
            given = {flat.master: Given(flat.gradient, factor, flat.weights) for flat in self._flats}
            self.optimizer.step_with(given)
            return
        for flat in self._flats:
            flat.master.grad = flat.gradient.float() * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_weights()

    @torch.no_grad()
    def update_weights(self) -> None:
        """Make the weights follow the masters."""
        for flat in self._flats:
            flat.weights.copy_(flat.master)

    @property
    def global_norm(self) -> torch.Tensor:
        """The norm of the whole gradient before clipping, of the step being made or the last one."""
        return self._norm

    def get_global_grad_norm(self) -> float:
        """As DeepSpeed calls it."""
        return float(self._norm)

    @property
    def masters(self) -> tuple[torch.Tensor, ...]:
        """fp32, one flat tensor a group of the optimizer."""
        return tuple(flat.master for flat in self._flats)

    def stretches(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """Every moving parameter, the master that it lies in, and from which element."""
        for index, flat in enumerate(self._flats):
            for parameter, start in zip(flat.parameters, starts(flat.parameters), strict=True):
                yield parameter, index, start

    def destroy(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()


_CPU = torch.device("cpu")


def _in_bf16(model: torch.nn.Module) -> torch.nn.Module:
    """Weights in bf16; buffers as they are, since rotary frequencies need fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _flatten(group: dict[str, Any], gradients: torch.dtype) -> Flat:
    """A group's parameters, laid flat, and the group with their master in their place."""
    flat = Flat.of(group["params"], gradients)
    group["params"] = [flat.master]
    return flat


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return found


def _after_gradient(parameter: Any, call: Callable[[torch.Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(call)
