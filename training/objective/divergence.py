"""Divergences between next-token distributions, of whole vocabularies or of a few buckets.

All arguments are log-probabilities in fp32 of shape (targets, outcomes), all results are in nats of shape (targets,).
An outcome is a token, or a bucket that stands for the rest of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outcomes:
    """A frozen model's log-probabilities (targets, outcomes) at a temperature.

    With `ids` (targets, k) the outcomes are those tokens and, unless they are the whole vocabulary, one bucket for the
    rest; without, they are the vocabulary in order.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor | None = None

    def of(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Another model's log-probabilities of the same outcomes, from its logits (targets, vocabulary)."""
        if self.ids is None:
            return (logits.float() / temperature).log_softmax(dim=-1)
        return bucket_log_probs(logits, self.ids, temperature)


def bucket_log_probs(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities (targets, k + 1) of the tokens `ids` (targets, k) and of all others together.

    The last column is left out when the ids are the whole vocabulary, since it would be the logarithm of nothing.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(dim=-1, keepdim=True)
    named = scaled.gather(1, ids) - total
    if ids.shape[1] == logits.shape[1]:
        return named
    rest = scaled.scatter(1, ids, -math.inf).logsumexp(dim=-1, keepdim=True) - total
    return torch.cat([named, rest], dim=1)


def forward_kl(given: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(given||tuned), arXiv 1503.02531."""
    return (given.exp() * (given - tuned)).sum(dim=-1)


def reverse_kl(given: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(tuned||given)."""
    return forward_kl(tuned, given)


def jensen_shannon(given: torch.Tensor, tuned: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(given||m) + (1 - beta) KL(tuned||m) with m = beta given + (1 - beta) tuned, arXiv 2306.13649.

    It vanishes as beta goes to 0 or 1; there the limits of its quotient by beta and by 1 - beta stand in its place,
    which are the forward and the reverse KL.
    """
    if beta == 0:
        return forward_kl(given, tuned)
    if beta == 1:
        return reverse_kl(given, tuned)
    mixed = torch.logaddexp(given + math.log(beta), tuned + math.log1p(-beta))
    return beta * forward_kl(given, mixed) + (1 - beta) * forward_kl(tuned, mixed)


def divergence(kind: str, beta: float) -> Compare:
    """The divergence of a spec: forward_kl, reverse_kl, or jsd with beta."""
    if kind == "jsd":
        return lambda given, tuned: jensen_shannon(given, tuned, beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[kind]
