"""Which example is seen when, and how a global batch is cut."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from training.data.batches import IGNORE, Schedule, collate, micro_batches, share
from training.data.encoding import Encoded


def epochs(schedule: Schedule) -> list[list[int]]:
    """The order of the examples in every epoch."""
    size = schedule.steps_per_epoch
    return [
        [index for step in range(start, start + size) for index in schedule.batch(step)]
        for start in range(0, schedule.num_steps, size)
    ]


@pytest.mark.parametrize(("examples", "batch"), [(48, 8), (50, 8), (7, 8), (8, 8), (1, 1)])
def test_every_epoch_holds_every_example_once(examples: int, batch: int) -> None:
    orders = epochs(Schedule(examples, batch, epochs=3, seed=0))
    assert [sorted(order) for order in orders] == [list(range(examples))] * 3


def test_the_last_batch_of_an_epoch_is_short() -> None:
    schedule = Schedule(50, 8, epochs=2, seed=0)
    assert (schedule.steps_per_epoch, schedule.num_steps) == (7, 14)
    assert [len(schedule.batch(step)) for step in range(14)] == [8, 8, 8, 8, 8, 8, 2] * 2


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epochs(Schedule(48, 8, epochs=2, seed=0))
    assert epochs(Schedule(48, 16, epochs=2, seed=0)) == first
    assert epochs(Schedule(48, 8, epochs=5, seed=0))[:2] == first
    assert first[0] != first[1]
    assert epochs(Schedule(48, 8, epochs=1, seed=1))[0] not in first
    assert first[0] != sorted(first[0])


def test_max_steps_ends_a_run_early_and_never_late() -> None:
    assert Schedule(48, 8, epochs=2, seed=0, max_steps=5).num_steps == 5
    assert Schedule(48, 8, epochs=2, seed=0, max_steps=50).num_steps == 12


@pytest.mark.parametrize("size", [24, 23, 5, 1])
@pytest.mark.parametrize(
    ("workers", "accumulation", "micro"), [(1, 1, 24), (1, 24, 1), (2, 3, 4), (3, 4, 2), (4, 1, 6)]
)
def test_micro_batches_are_a_partition_whatever_the_workers(
    size: int, workers: int, accumulation: int, micro: int
) -> None:
    indices = list(range(100, 100 + size))
    lengths = [index * 7919 % 31 for index in range(200)]
    cut = micro_batches(indices, lengths, micro, workers * accumulation)
    shares = [share(cut, rank, workers) for rank in range(workers)]
    assert {len(batches) for batches in shares} == {accumulation}
    assert max(len(batch) for batch in cut) <= micro
    seen = Counter(index for batches in shares for batch in batches for index in batch)
    assert seen == Counter(indices)


def test_micro_batches_hold_examples_of_like_length() -> None:
    assert micro_batches([0, 1, 2, 3], [9, 1, 8, 2], micro=2, count=2) == [[1, 3], [2, 0]]


def test_rows_are_padded_on_the_right_and_only_targets_are_labels() -> None:
    batch = collate([Encoded((5, 6, 7), (False, True, True)), Encoded((8, 9), (False, True))], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]


def test_an_empty_micro_batch_is_padding_without_targets() -> None:
    batch = collate([], pad_id=3)
    assert (batch["input_ids"] == 3).all()
    assert (batch["labels"] == IGNORE).all()
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].dtype == torch.long
