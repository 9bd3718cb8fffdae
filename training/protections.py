"""How old knowledge is kept: steps on the sharded fp32 master weights, hooked to the client optimizer.

DeepSpeed puts each rank's fp32 partition, with its reduced gradient, into the client optimizer's groups before it
calls `step`, at every ZeRO stage. What runs in a step pre-hook therefore sees shards, and needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from training.strategy import Flow, Kl, L2sp, Stm

Shards = list[torch.Tensor]


class AttachedProtection(Protocol):
    """What a protection keeps between steps; its tensors are checkpointed beside the optimizer's."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def shards(optimizer: torch.optim.Optimizer) -> Shards:
    """What the client optimizer steps over now: at ZeRO 3 nothing between steps, and one sub-group in a step."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def masters(engine: Any, optimizer: torch.optim.Optimizer) -> Shards:
    """All of this rank's fp32 masters (at ZeRO 0 in fp32: the parameters), in the optimizer's order."""
    return list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or shards(optimizer))


class AttachedL2sp:
    """Adds strength * (theta - theta_0) to the gradient: the derivative of L2-SP, arXiv 1802.01483."""

    def __init__(self, protection: L2sp, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._strength = protection.strength
        self._anchors = {shard: shard.detach().float().clone() for shard in masters(engine, optimizer)}
        optimizer.register_step_pre_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for shard in shards(optimizer):
            if shard.grad is not None:
                shard.grad.add_((shard - self._anchors[shard]).to(shard.grad.dtype), alpha=self._strength)

    def state(self) -> dict[str, Any]:
        return {"anchors": list(self._anchors.values())}

    def restore(self, state: dict[str, Any]) -> None:
        for anchor, saved in zip(self._anchors.values(), state["anchors"], strict=True):
            anchor.copy_(saved)


Attach = Callable[[Any, Any, torch.optim.Optimizer], AttachedProtection]
PROTECTIONS: dict[type, Attach] = {L2sp: AttachedL2sp}
# These act on the data and in the loss: training/weighing.py, training/objectives.py.
ELSEWHERE = (Kl, Flow, Stm)


def attach_all(protections: Sequence[Any], engine: Any, optimizer: torch.optim.Optimizer) -> list[AttachedProtection]:
    """Hook every protection of the spec that acts on the weights to the client optimizer, in the spec's order."""
    attached = [protection for protection in protections if not isinstance(protection, ELSEWHERE)]
    return [PROTECTIONS[type(protection)](protection, engine, optimizer) for protection in attached]
