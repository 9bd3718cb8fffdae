"""How a global batch is cut and dealt to workers, and the tensors that they feed to the model.

It is cut into the same micro-batches whatever the number of workers, so the loss curve does not change with the world
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch.nn import functional

from training.data.encoding import Encoded
from training.data.schedule import Schedule
from training.data.store import Numbers

__all__ = ["IGNORE", "Schedule", "collate", "laid_out", "micro_batches", "share", "to_device"]

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


def collate(examples: Sequence[Encoded], pad_id: int, end_to_end: bool = False) -> dict[str, torch.Tensor]:
    """Right-padded tensors, each (examples, longest): input_ids and labels. With end_to_end, those of laid_out().

    And of the targets (targets,), found here since a device would have to be waited for: target_places, from which
    position of all rows end to end each is predicted; target_ids; target_rows, the example that each belongs to.
    What follows a row cannot be seen from it under causal attention, so no attention mask is needed and the
    fastest attention kernels apply. A micro-batch without examples becomes one row of padding without targets:
    every worker takes every step.
    """
    rows = list(examples) or [Encoded((pad_id, pad_id), (False, False))]
    if end_to_end:
        return _with_targets(laid_out(rows))
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        tokens, targets = torch.tensor(row.ids), torch.tensor(row.is_target)
        ids[index, : len(row.ids)] = tokens
        labels[index, : len(row.ids)] = torch.where(targets, tokens, IGNORE)
    return _with_targets({"input_ids": ids, "labels": labels})


def _with_targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with its targets beside it. The first token of a row is never one."""
    labels = batch["labels"]
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    places = (following != IGNORE).nonzero().squeeze(1)
    rows = batch["examples"].flatten()[places] if "examples" in batch else places // labels.shape[1]
    return batch | {"target_places": places, "target_ids": following[places], "target_rows": rows}


def laid_out(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Examples end to end in one row, tensors (1, tokens): see training/attention.py.

    input_ids; labels, of which the first of an example is none, since what stands before is another's; position_ids,
    which start anew with every example; examples, the number of each token's. And of the examples, in int32: bounds
    (examples + 1,), where each begins and the last ends, and longest (), which stays in the processor's memory.
    """
    lengths = torch.tensor([len(example.ids) for example in examples])
    count = int(lengths.sum())
    ids = torch.from_numpy(np.fromiter(chain.from_iterable(example.ids for example in examples), np.int64, count))
    flags = np.fromiter(chain.from_iterable(example.is_target for example in examples), np.bool_, count)
    is_target = torch.from_numpy(flags)
    starts = lengths.cumsum(0) - lengths
    is_target[starts] = False
    numbers = torch.repeat_interleave(torch.arange(len(examples)), lengths)
    return {
        "input_ids": ids[None],
        "labels": torch.where(is_target, ids, IGNORE)[None],
        "position_ids": (torch.arange(len(ids)) - starts[numbers])[None],
        "examples": numbers[None],
        "bounds": functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "longest": lengths.max().int(),
    }


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on a device, less what is read before the device computes."""
    return {name: tensor if name == "longest" else tensor.to(device) for name, tensor in batch.items()}
