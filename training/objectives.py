"""What is learned: losses as sums over target tokens, normalised by the whole global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from training.batches import IGNORE


class SftLoss:
    """Cross-entropy on target tokens, computing logits at their positions alone.

    A hook on the output head passes on only the hidden states that predict a target, so that the largest tensor of
    a step is (targets, vocabulary) and not (rows, length, vocabulary).
    """

    def __init__(self, model: Any) -> None:
        self._index = torch.zeros(0, dtype=torch.long)
        self._length = 0
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = inputs
        rows = hidden[:, -self._length :]  # a soft prompt's virtual tokens stand before every row
        return (rows.flatten(0, 1)[self._index], *rest)

    def sum(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss in nats summed over the targets of a batch (rows, length), as a scalar in fp32.

        The first token of a row is never a target, since nothing stands before it. A batch without targets gives
        a zero that still has gradients: every worker takes part in every reduction.
        """
        labels = batch["labels"]
        following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        wanted = following != IGNORE
        self._length = labels.shape[1]
        self._index = wanted.nonzero().squeeze(1)
        if self._index.numel() == 0:
            self._index = labels.new_zeros(1)
            nothing: torch.Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits.sum().float() * 0.0
            return nothing
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return functional.cross_entropy(logits.float(), following[wanted], reduction="sum")
