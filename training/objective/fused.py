"""Cross-entropy straight from hidden states: the logits of all targets never stand in memory together.

The idea is that of Cut Your Losses (arXiv 2411.09009) and of Liger's fused linear cross-entropy (arXiv 2410.10989):
gradients are computed with the loss, chunk by chunk, and only those of hidden states and of the head's weight are kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from training.memory import FUSED_CHUNK_BYTES

# A chunk's logits: as many as keep a GPU's multipliers busy.
_CHUNK_BYTES = FUSED_CHUNK_BYTES


def weighted_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of shares * losses, with gradients, and the losses without.

    Args:
        hidden: (targets, size) of the last layer.
        weight: (vocabulary, size) of the output head.
        ids: (targets,) the tokens to predict.
        shares: (targets,) in fp32.

    Returns:
        A scalar and (targets,) nats, in fp32.
    """
    value, losses = _Fused.apply(hidden, weight, ids, shares)  # type: ignore[no-untyped-call]
    return value, losses


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(len(ids), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = None
        rows = max(1, _CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.T
            losses[part], gradient = _step(logits.device.type)(logits, ids[part], shares[part])
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[part])
            if needs_weight:
                of_weight = _add_product(of_weight, gradient, hidden[part])
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * shares).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = outer[0]
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden.mul_(factor.to(of_hidden.dtype)),
            None if of_weight is None else of_weight.mul_(factor.to(of_weight.dtype)).to(ctx.dtype),
            None,
            None,
        )


def _add_product(total: torch.Tensor | None, gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """total + gradient.T @ hidden (vocabulary, size); from the second chunk on in fp32, or small ones would be lost."""
    product = gradient.T @ hidden
    return product if total is None else total.float().add_(product)


def _losses_and_gradient(
    logits: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats (rows,) and the gradient (rows, vocabulary), in the logits' dtype, of the sum of shares * nats."""
    numbers = logits.float()
    norm = numbers.logsumexp(dim=-1, keepdim=True)
    right = torch.arange(logits.shape[1], device=logits.device) == ids[:, None]
    losses = (norm - numbers.gather(1, ids[:, None])).squeeze(1)
    gradient = ((numbers - norm).exp() - right.float()) * shares[:, None]
    return losses, gradient.to(logits.dtype)


@lru_cache(maxsize=2)
def _step(device: str) -> Any:
    """The element-wise part: on a GPU one compiled kernel, whatever the number of rows."""
    return torch.compile(_losses_and_gradient, dynamic=True) if device == "cuda" else _losses_and_gradient
