"""What the serving tests share: a free port, and log-probabilities computed with transformers."""

from __future__ import annotations

import socket

import torch

from training.evaluation.scorecard import Probe

PROMPTS = tuple(tuple(range(start, start + 40)) for start in (5, 60, 150))


def teacher_forced(model: torch.nn.Module) -> tuple[Probe, ...]:
    """The log-probability of every token of every prompt but its first."""
    return tuple(_probe(model, prompt) for prompt in PROMPTS)


def _probe(model: torch.nn.Module, token_ids: tuple[int, ...]) -> Probe:
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)  # [1, tokens, vocabulary]
    picked = scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return Probe(token_ids=token_ids, log_probs=tuple(picked.tolist()))


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
