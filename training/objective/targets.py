"""What a causal language model predicts at the target positions of a batch, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from training.data.batches import IGNORE

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Targets:
    """The predictions at a batch's target positions, row after row.

    Attributes:
        logits: (targets, vocabulary); one row without meaning when the batch has no targets.
        ids: (targets,) the tokens that follow.
        rows: (targets,) the example that each belongs to: the batch's row, or the number of one laid end to end.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor

    @property
    def is_empty(self) -> bool:
        return self.ids.numel() == 0

    def nothing(self) -> torch.Tensor:
        """A zero that has gradients, so that a worker without targets takes part in every reduction."""
        return self.logits.sum().float() * 0.0

    def cross_entropy(self) -> torch.Tensor:
        """Nats (targets,) in fp32."""
        return functional.cross_entropy(self.logits.float(), self.ids, reduction="none")


def hidden_at(inputs: tuple[torch.Tensor, ...], length: int, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What an output head is given, its hidden states (rows, length, size) cut to (positions, size)."""
    hidden, *rest = inputs
    rows = hidden[:, -length:]  # a soft prompt's virtual tokens stand before every row
    return (rows.flatten(0, 1)[index], *rest)


def apart(batch: Batch) -> dict[str, Any]:
    """What tells a model where examples begin that are laid end to end, under the names that transformers uses."""
    if "bounds" not in batch:
        return {}
    bounds, longest = batch["bounds"], int(batch["longest"])
    return {
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class TargetLogits:
    """Runs a causal language model with logits at target positions alone.

    A hook on the output head passes on only the hidden states that predict a target, so that the largest tensor of
    a step is (targets, vocabulary) and not (rows, length, vocabulary).
    """

    def __init__(self, model: Any) -> None:
        self._index = torch.zeros(0, dtype=torch.long)
        self._length = 0
        self._selects = True
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not self._selects:
            return inputs
        return hidden_at(inputs, self._length, self._index)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Logits at every position meanwhile, for whoever asks the model itself."""
        self._selects = False
        try:
            yield
        finally:
            self._selects = True

    def targets(self, model: Any, batch: Batch) -> Targets:
        """The predictions of a batch (rows, length) by the model, or by the engine around it.

        The first token of a row is never a target, since nothing stands before it.
        """
        labels = batch["labels"]
        following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        found = (following != IGNORE).nonzero().squeeze(1)
        self._length = labels.shape[1]
        self._index = found if found.numel() else labels.new_zeros(1)
        logits = model(input_ids=batch["input_ids"], **apart(batch), use_cache=False).logits
        rows = batch["examples"].flatten()[found] if "examples" in batch else found // labels.shape[1]
        return Targets(logits, following[found], rows)

    def sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The cross-entropy in nats summed over the targets of a batch, as a scalar in fp32."""
        targets = self.targets(model, batch)
        if targets.is_empty:
            return targets.nothing()
        return functional.cross_entropy(targets.logits.float(), targets.ids, reduction="sum")
