"""How a global batch is cut and dealt to workers, and the tensors that they feed to the model.

It is cut into the same micro-batches whatever the number of workers, so the loss curve does not change with the world
size.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    lengths = [len(example.ids) for example in examples]
    places = lay_out(lengths, row_tokens)
    longest = max(start + length for (_, start), length in zip(places, lengths, strict=True))
    shape = (places[-1][0] + 1, longest)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    numbers, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for number, (example, (row, start)) in enumerate(zip(examples, places, strict=True)):
        end = start + len(example.ids)
        tokens, targets = torch.tensor(example.ids), torch.tensor(example.is_target)
        ids[row, start:end] = tokens
        labels[row, start + 1 : end] = torch.where(targets, tokens, IGNORE)[1:]
        numbers[row, start:end] = number
        positions[row, start:end] = torch.arange(end - start)
        positions[row, end:] = torch.arange(longest - end)  # as padding, unless another example follows
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "examples": numbers}
