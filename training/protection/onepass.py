"""AdamW with pulls and the path integral in its one pass over the weights, for GPUs.

A step of AdamW is bound by memory. Hooks around it (`protections`) read weights and gradients a second and third time;
here the compiler puts all of it into one kernel, and an anchor and an importance are all that is read beside. The
arithmetic and its order are those of the hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Elements a kernel takes at once: what 32-bit indices reach.
_REACH = 1 << 30
_LARGE = 1 << 26


Place = Callable[[torch.Tensor], int]


@dataclass(frozen=True, eq=False)
class Pull:
    """strength/2 sum_i w_i (theta_i - anchor_i)^2 over the shards, w = 1 where there are no weights."""

    anchors: list[torch.Tensor]
    weights: list[torch.Tensor] | None
    strength: float
    is_proximal: bool


@dataclass(frozen=True, eq=False)
class Path:
    """omega -= g dtheta over the shards, g the gradient without pulls and times `unclip`."""

    omega: list[torch.Tensor]
    unclip: Callable[[], torch.Tensor | float]


@dataclass(frozen=True, eq=False)
class Given:
    """What an engine hands over beside a shard: its gradient, a factor for that, and weights that follow the shard."""

    gradient: torch.Tensor
    factor: torch.Tensor
    weights: torch.Tensor


class OnePassAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) that also does what is in `pulls` and `path`."""

    def __init__(self, groups: Any, *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self._pulls: list[tuple[Place, Pull]] = []
        self._path: tuple[Place, Path] | None = None

    def pull(self, place: Place, pull: Pull) -> Callable[[], None]:
        """Pull from the next step on; what is returned ends it. `place` tells which shard a tensor is."""
        entry = place, pull
        self._pulls.append(entry)
        return lambda: self._pulls.remove(entry)

    def record(self, place: Place, path: Path) -> Callable[[], None]:
        """Record from the next step on; what is returned ends it."""
        self._path = place, path

        def end() -> None:
            self._path = None

        return end

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over what lies in the groups with a gradient."""
        unclip = torch.as_tensor(self._path[1].unclip() if self._path else 1.0)
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    self._step(theta, theta.grad, group, unclip, None)

    @torch.no_grad()
    def step_with(self, given: Mapping[torch.Tensor, Given]) -> None:
        """One step with gradients as an engine has them, in place of those in `grad`."""
        unclip = torch.as_tensor(self._path[1].unclip() if self._path else 1.0)
        for group in self.param_groups:
            for theta in group["params"]:
                self._step(theta, given[theta].gradient, group, unclip, given[theta])

    def _step(
        self,
        theta: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        unclip: torch.Tensor,
        given: Given | None,
    ) -> None:
        state = self._state_of(theta)
        state["step"] += 1
        pulls = [(pull, place(theta)) for place, pull in self._pulls]
        omega = self._path[1].omega[self._path[0](theta)] if self._path else None
        rates = _rates(group, float(state["step"]))
        first, second = group["betas"]
        run = _compiled(theta.numel() >= _LARGE) if theta.is_cuda else protected_adamw
        for start in range(0, theta.numel(), _REACH):
            cut = functools.partial(_cut, stretch=slice(start, start + _REACH))
            pulled = [
                (
                    cut(pull.anchors[place]),
                    cut(pull.weights[place]) if pull.weights else None,
                    torch.tensor(pull.strength, dtype=torch.float64),
                    pull.is_proximal,
                )
                for pull, place in pulls
            ]
            path = cut(omega) if omega is not None else None
            parts = cut(theta), cut(grad), cut(state["exp_avg"]), cut(state["exp_avg_sq"])
            beside = (given.factor, cut(given.weights)) if given else None
            run(*parts, pulled, path, unclip, rates, (first, second, group["eps"]), beside)

    def _state_of(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[theta]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(theta, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(theta, requires_grad=False)
        return state


def _cut(tensor: torch.Tensor, stretch: slice) -> torch.Tensor:
    return tensor.detach().view(-1)[stretch]


def _rates(group: dict[str, Any], step: float) -> tuple[torch.Tensor, ...]:
    """What changes from step to step, as tensors, for which a kernel is not compiled anew.

    The rate, the factor of decay, the rate over its bias correction, and the root of the second moment's correction.
    """
    first, second = group["betas"]
    rate = float(group["lr"])
    values = rate, 1 - rate * group["weight_decay"], rate / (1 - first**step), (1 - second**step) ** 0.5
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def protected_adamw(
    theta: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    pulls: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, bool]],
    omega: torch.Tensor | None,
    unclip: torch.Tensor,
    rates: tuple[torch.Tensor, ...],
    betas: tuple[float, float, float],
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """One step over a flat stretch, in place: coupled pulls, AdamW, proximal pulls, path.

    Args:
        pulls: anchors, weights, strength and whether it is proximal, of each.
        rates: see `_rates`.
        betas: of the two moments, and epsilon.
        given: a factor for the gradient, which may be in bf16, and weights in bf16 that become what theta does.
    """
    rate, decay, corrected, root = rates
    first, second, epsilon = betas
    if given is not None:
        grad = grad.float() * given[0]
    pulled = grad
    for anchor, weight, strength, is_proximal in pulls:
        if not is_proximal:
            pulled = pulled + (theta - anchor) * _times(weight, strength)
    mean.lerp_(pulled, 1 - first)
    square.mul_(second).addcmul_(pulled, pulled, value=1 - second)
    new = theta * decay - corrected * mean / (square.sqrt() / root + epsilon)
    for anchor, weight, strength, is_proximal in reversed(pulls):
        if is_proximal:
            force = _times(weight, rate * strength)
            new = new + (anchor - new) * (force / (1 + force))
    if omega is not None:
        omega.addcmul_(grad * unclip, theta - new)
    theta.copy_(new)
    if given is not None:
        given[1].copy_(new)


def _times(weight: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
    return factor if weight is None else weight.float() * factor


@functools.cache
def _compiled(is_large: bool) -> Callable[..., None]:
    """Large shards, which are few, get a kernel each for their size: one for any size is slower by a half."""
    return torch.compile(protected_adamw, dynamic=False if is_large else None)
