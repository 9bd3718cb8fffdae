"""What a causal language model predicts at the target positions of a batch, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from training.attention import attend_as_before
from training.objective.fused import weighted_cross_entropy

# Kernels in 16 bits round otherwise; a model that scales or caps its logits is further off.
_ROUNDING = 1e-2

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


@dataclass(frozen=True)
class Learned:
    """Cross-entropy at a batch's target positions: the sum of shares * losses, with gradients, and the losses without.

    Attributes:
        value: a scalar.
        losses: (targets,) nats in fp32.
        rows: (targets,) as in Targets.
    """

    value: torch.Tensor
    losses: torch.Tensor
    rows: torch.Tensor


class TargetLogits:
    """Runs a causal language model with logits at target positions alone.

    A hook on the output head passes on only the hidden states that predict a target, so that the largest tensor of
    a step is (targets, vocabulary) and not (rows, length, vocabulary).
    """

    def __init__(self, model: Any) -> None:
        self._index = torch.zeros(0, dtype=torch.long)
        self._length = 0
        self._asked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._losses = torch.zeros(0)
        self._selects = True
        self._model = model
        self.fuses = False
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._select)
        self._head, self._logits_of = head, head.forward
        self.can_fuse = type(head) is torch.nn.Linear and head.bias is None
        if self.can_fuse:
            head.forward = self._answer

    def _select(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not self._selects:
            return inputs
        return hidden_at(inputs, self._length, self._index)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model as it came meanwhile, with logits at every position, for whoever asks it for itself."""
        self._selects = False
        try:
            with attend_as_before(self._model):
                yield
        finally:
            self._selects = True

    def _answer(self, hidden: torch.Tensor) -> torch.Tensor:
        """In the output head's place: its logits or, where that is asked for, the loss (1,)."""
        if self._asked is None:
            logits: torch.Tensor = self._logits_of(hidden)
            return logits
        value, self._losses = weighted_cross_entropy(hidden, self._head.weight, *self._asked)
        return value.reshape(1)

    def _look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The targets' ids and rows (targets,); the head shall look where they are predicted from."""
        places = batch["target_places"]
        self._length = batch["labels"].shape[1]
        self._index = places if places.numel() else places.new_zeros(1)
        return batch["target_ids"], batch["target_rows"]

    def targets(self, model: Any, batch: Batch) -> Targets:
        """The predictions of a batch (rows, length) by the model, or by the engine around it."""
        ids, rows = self._look(batch)
        return Targets(self._run(model, batch), ids, rows)

    def _run(self, model: Any, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], **apart(batch), use_cache=False).logits
        return logits

    def learned(self, model: Any, batch: Batch, shares: torch.Tensor) -> Learned:
        """The cross-entropy of a batch. Where `fuses` is set, its logits never stand in memory together.

        Args:
            shares: (rows,) or (examples,): what every target of theirs is multiplied with.
        """
        if not self.fuses:
            targets = self.targets(model, batch)
            losses = targets.cross_entropy() if not targets.is_empty else targets.nothing().expand(0)
            value = (shares[targets.rows] * losses).sum() if not targets.is_empty else targets.nothing()
            return Learned(value, losses.detach(), targets.rows)
        ids, rows = self._look(batch)
        given = (ids, shares[rows]) if ids.numel() else (ids.new_zeros(1), shares.new_zeros(1))
        self._asked = given
        try:
            value = self._run(model, batch).reshape(())
        finally:
            self._asked = None
        return Learned(value, self._losses[: ids.numel()], rows)

    @torch.no_grad()
    def fuses_truly(self, model: Any, batch: Batch) -> bool:
        """Whether the fused loss is the plain one: not where a model changes its head's logits. All workers call it."""
        if not self.can_fuse:
            return False
        shares = torch.ones(
            int(batch["input_ids"].shape[0]) * batch["input_ids"].shape[1], device=batch["labels"].device
        )
        values = []
        for self.fuses in (False, True):
            values.append(float(self.learned(model, batch, shares).value))
        self.fuses = False
        return abs(values[0] - values[1]) <= _ROUNDING * abs(values[0])

    def sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The cross-entropy in nats summed over the targets of a batch, as a scalar in fp32."""
        targets = self.targets(model, batch)
        if targets.is_empty:
            return targets.nothing()
        return functional.cross_entropy(targets.logits.float(), targets.ids, reduction="sum")
