"""How old knowledge is kept: steps on the sharded fp32 master weights, hooked to the client optimizer.

DeepSpeed puts each rank's fp32 partition, with its reduced gradient, into the client optimizer's groups before it
calls `step`, at every ZeRO stage. What runs in a step hook therefore sees shards, and needs no communication. Nothing
here knows DeepSpeed: a `Layout` of plain parameters and any torch optimizer do as well. An `OnePassAdamW` does the same
in its own kernel, without hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from training.protection.layout import Layout, Sheet
from training.protection.onepass import OnePassAdamW, Path, Pull

# Elements handled at once, so that what lies between two operations stays in a processor's cache.
_CHUNK = 1 << 22


def stepped(layout: Layout, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, torch.Tensor]]:
    """The shards that the optimizer steps over now, with their place in the layout: at ZeRO 3 one sub-group a step."""
    for group in optimizer.param_groups:
        for master in group["params"]:
            if master.grad is not None:
                yield layout.index(master), master


class QuadraticPull:
    """Pulls every weight towards its anchor, the weight it has when this is attached.

    The penalty is strength/2 sum_i w_i (theta_i - anchor_i)^2: L2-SP (arXiv 1802.01483) with w = 1, EWC (arXiv
    1612.00796) with the Fisher information, SI (arXiv 1703.04200) with its importance and twice its strength.

    `coupled` adds the gradient to the loss's own, after clipping, before the optimizer sees it. `proximal` minimises
    the penalty around the optimizer's new weights instead, theta <- (theta + eta s w anchor) / (1 + eta s w) with the
    rate eta of the step, which is stable at any strength.
    """

    def __init__(
        self, layout: Layout, optimizer: torch.optim.Optimizer, *, strength: float, weights: Sheet | None, update: str
    ) -> None:
        self._layout, self._strength, self._weights = layout, strength, weights
        dtype = weights[0].dtype if weights else torch.float32
        self._anchors = layout.copy(dtype)
        self._end = self._attach(optimizer, is_proximal=update != "coupled")

    def detach(self) -> None:
        """Pull no more; the optimizer keeps its state."""
        self._end()

    def _attach(self, optimizer: torch.optim.Optimizer, *, is_proximal: bool) -> Callable[[], None]:
        if isinstance(optimizer, OnePassAdamW):
            return optimizer.pull(self._layout.index, Pull(self._anchors, self._weights, self._strength, is_proximal))
        if not is_proximal:
            return optimizer.register_step_pre_hook(self._add_gradient).remove
        handle = optimizer.register_step_post_hook(self._pull_back)
        # It is part of the step, so whoever watches what the step did to the weights comes after it.
        hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(handle.id, last=False)
        return handle.remove

    @torch.no_grad()
    def _add_gradient(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for index, master in stepped(self._layout, optimizer):
            assert master.grad is not None
            for theta, anchor, weight, grad in self._chunks(index, master, master.grad):
                distance = theta - anchor
                if weight is None:
                    grad.add_(distance, alpha=self._strength)
                else:
                    grad.addcmul_(distance, weight, value=self._strength)

    @torch.no_grad()
    def _pull_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            pull = group["lr"] * self._strength
            for master in group["params"]:
                for theta, anchor, weight, _ in self._chunks(self._layout.index(master), master, master):
                    force = pull if weight is None else weight.float() * pull
                    theta.lerp_(anchor.to(theta.dtype), force / (1 + force))

    def _chunks(
        self, index: int, master: torch.Tensor, other: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        flat = [master.detach().view(-1), self._anchors[index].view(-1), other.detach().view(-1)]
        weights = self._weights[index].view(-1) if self._weights else None
        for start in range(0, master.numel(), _CHUNK):
            end = start + _CHUNK
            theta, anchor, beside = (tensor[start:end] for tensor in flat)
            yield theta, anchor, weights[start:end] if weights is not None else None, beside


class PathIntegral:
    """Synaptic intelligence's path integral omega = -sum over steps of g dtheta, arXiv 1703.04200.

    g is the loss's own gradient, before clipping and before any pull, and dtheta what the whole step did to the weight.
    To be attached before the pulls.

    Args:
        unclip: the factor that undoes the clipping of the gradient in the step now being made.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        unclip: Callable[[], torch.Tensor | float] = lambda: 1.0,
    ) -> None:
        self._layout, self._unclip = layout, unclip
        self.omega = layout.zeros()
        self._start = layout.copy()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ends = self._attach(optimizer)

    def _attach(self, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        if isinstance(optimizer, OnePassAdamW):
            return [optimizer.record(self._layout.index, Path(self.omega, self._unclip))]
        hooks = optimizer.register_step_pre_hook(self._note), optimizer.register_step_post_hook(self._add)
        return [handle.remove for handle in hooks]

    def detach(self) -> None:
        """Record no more; what was recorded stays."""
        for end in self._ends:
            end()

    @torch.no_grad()
    def _note(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for index, master in stepped(self._layout, optimizer):
            assert master.grad is not None
            self._before[index] = master.detach().float().clone(), master.grad.float() * self._unclip()

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for index, (theta, gradient) in self._before.items():
            self.omega[index].addcmul_(gradient, theta.sub_(self._layout.masters[index].detach()))
        self._before.clear()

    def importance(self, xi: float, earlier: Sheet | None = None) -> Sheet:
        """omega / ((theta - theta_start)^2 + xi), with what earlier tasks left added; may be negative."""
        moved = [(now.detach() - start) ** 2 for now, start in zip(self._layout.masters, self._start, strict=True)]
        own = [omega / (distance + xi) for omega, distance in zip(self.omega, moved, strict=True)]
        return [mine + old for mine, old in zip(own, earlier, strict=True)] if earlier else own

    def sheets(self) -> dict[str, Sheet]:
        """What a checkpoint must hold."""
        return {"omega": self.omega}
