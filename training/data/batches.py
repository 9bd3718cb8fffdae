"""How a global batch is cut and dealt to workers, and the tensors that they feed to the model.

It is cut into the same micro-batches whatever the number of workers, so the loss curve does not change with the world
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from training.data.encoding import Encoded
from training.data.packing import lay_out
from training.data.schedule import Schedule
from training.data.store import Numbers

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


def collate(examples: Sequence[Encoded], pad_id: int, row_tokens: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded tensors, each (examples, longest): input_ids and labels. With row_tokens, packed() ones.

    What follows a row cannot be seen from it under causal attention, so no attention mask is needed and the
    fastest attention kernels apply. A micro-batch without examples becomes one row of padding without targets:
    every worker takes every step.
    """
    rows = list(examples) or [Encoded((pad_id, pad_id), (False, False))]
    if row_tokens:
        return packed(rows, pad_id, row_tokens)
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        tokens, targets = torch.tensor(row.ids), torch.tensor(row.is_target)
        ids[index, : len(row.ids)] = tokens
        labels[index, : len(row.ids)] = torch.where(targets, tokens, IGNORE)
    return {"input_ids": ids, "labels": labels}


def packed(examples: Sequence[Encoded], pad_id: int, row_tokens: int) -> dict[str, torch.Tensor]:
    """Examples side by side in rows of at most row_tokens, right-padded tensors (rows, longest).

    input_ids; labels, of which the first of an example is none, since what stands before is another's; position_ids,
    which start anew with every example, and by which attention is kept inside it; examples, the number of each
    token's (the padding counts as the first's: it has no targets).
    """
    lengths = np.array([len(example.ids) for example in examples])
    rows, starts = np.array(lay_out(lengths.tolist(), row_tokens)).T
    shape = (int(rows[-1]) + 1, int((starts + lengths).max()))
    offsets = np.arange(lengths.sum())
    inside = offsets - np.repeat(lengths.cumsum() - lengths, lengths)  # each token's place in its example
    places = np.repeat(rows * shape[1] + starts, lengths) + inside
    tokens = np.fromiter(chain.from_iterable(example.ids for example in examples), np.int64, len(offsets))
    targets = np.fromiter(chain.from_iterable(example.is_target for example in examples), np.bool_, len(offsets))
    ids, labels = np.full(shape, pad_id), np.full(shape, IGNORE)
    numbers, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, end in {int(row): int(end) for row, end in zip(rows, starts + lengths, strict=True)}.items():
        positions[row, end:] = np.arange(shape[1] - end)
    ids.flat[places], positions.flat[places] = tokens, inside
    labels.flat[places] = np.where(targets & (inside > 0), tokens, IGNORE)
    numbers.flat[places] = np.repeat(np.arange(len(examples)), lengths)
    made = {"input_ids": ids, "labels": labels, "position_ids": positions, "examples": numbers}
    return {name: torch.from_numpy(values) for name, values in made.items()}
