"""Examples side by side in rows of max_length tokens, without a look at each other. Free of torch."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from training.data.store import Numbers

# A plan looks at no more batches than this; a fuller one than any of them makes its micro-batches larger.
BATCHES_LOOKED_AT = 2000


def pack(indices: Iterable[int], lengths: Sequence[int] | Numbers, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each example, the longest first, into the row that it leaves the least room in.

    An example that is longer than a row has one to itself. Rows are in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted; full rows are gone
    for index in sorted(indices, key=lambda index: (-int(lengths[index]), index)):
        length = int(lengths[index])
        place = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def packed_batches(
    indices: Iterable[int], lengths: Sequence[int] | Numbers, capacity: int, count: int
) -> list[list[int]]:
    """A global batch as `count` micro-batches of packed rows, each the examples of its rows one after the other.

    Rows are dealt out in turn, the fullest first, so that workers have as much to do as each other; spare micro-batches
    are empty.
    """
    rows = pack(indices, lengths, capacity)
    return [[index for row in rows[start::count] for index in row] for start in range(count)]


def most_rows(batches: Iterable[Sequence[int]], lengths: Sequence[int] | Numbers, capacity: int) -> int:
    """The most packed rows that any of the global batches needs."""
    return max(len(pack(batch, lengths, capacity)) for batch in batches)


def looked_at(num_steps: int) -> range:
    """The steps whose batches a plan packs: all, or as many as are enough, evenly spread."""
    return range(0, num_steps, -(-num_steps // BATCHES_LOOKED_AT))


def efficiency(rows: Sequence[Sequence[int]], lengths: Sequence[int] | Numbers, capacity: int) -> float:
    """The share of the rows' tokens that are examples'."""
    return sum(int(lengths[index]) for row in rows for index in row) / (len(rows) * capacity)
