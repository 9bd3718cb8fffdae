"""How a global batch is cut and dealt to workers, and the tensors that they feed to the model.

It is cut into the same micro-batches whatever the number of workers, so the loss curve does not change with the world
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.encoding import Encoded
from training.schedule import Schedule
from training.store import Numbers

__all__ = ["IGNORE", "Schedule", "collate", "micro_batches", "share"]

IGNORE = -100


def micro_batches(indices: Sequence[int], lengths: Sequence[int] | Numbers, micro: int, count: int) -> list[list[int]]:
    """A global batch as `count` micro-batches of at most `micro` examples of like length; spare ones are empty.

    Like lengths beside each other save padding; the loss is a sum over the global batch, so the cut is free.
    """
    ordered = sorted(indices, key=lambda index: (lengths[index], index))
    return [ordered[start * micro : (start + 1) * micro] for start in range(count)]


def share(batches: list[list[int]], rank: int, workers: int) -> list[list[int]]:
    """A worker's micro-batches: every `workers`-th, so that long and short ones spread evenly."""
    return batches[rank::workers]


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors, each (examples, longest): input_ids and labels.

    What follows a row cannot be seen from it under causal attention, so no attention mask is needed and the
    fastest attention kernels apply. A micro-batch without examples becomes one row of padding without targets:
    every worker takes every step.
    """
    rows = list(examples) or [Encoded((pad_id, pad_id), (False, False))]
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        tokens, targets = torch.tensor(row.ids), torch.tensor(row.is_target)
        ids[index, : len(row.ids)] = tokens
        labels[index, : len(row.ids)] = torch.where(targets, tokens, IGNORE)
    return {"input_ids": ids, "labels": labels}
