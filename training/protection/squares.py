"""Squares of per-example gradients, from which the diagonal Fisher information is made.

Squares must be taken example by example, before anything is averaged: the square of a mean gradient vanishes where the
model has learned its data, and protects nothing. A hook on every parameter squares the gradient of each backward pass,
and whatever reduces and accumulates gradients (DeepSpeed at any ZeRO stage, or autograd alone) then adds up squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class SquaredGradients:
    """While open, every backward pass leaves `weight` times the square of its gradient."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self.weight = 1.0

    @contextmanager
    def open(self) -> Iterator[SquaredGradients]:
        handles: list[Any] = [
            parameter.register_hook(self._square)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _square(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * gradient * self.weight


def diagonal_fisher(
    named: Mapping[str, torch.Tensor], losses: Iterable[tuple[float, torch.Tensor]], examples: int
) -> dict[str, torch.Tensor]:
    """The mean over examples of sum_k weight_k (d loss_k / d theta)^2, in plain autograd.

    Args:
        losses: (weight, loss) pairs: one (1, loss) an example where its label is drawn or given, or the loss of each
            class with the probability of the class for the expectation over all of them.
    """
    for parameter in named.values():
        parameter.grad = None
    with SquaredGradients(named.values()).open() as squares:
        for weight, loss in losses:
            squares.weight = weight
            loss.backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad / examples for name, parameter in named.items() if parameter.grad is not None}
