"""How many rows of every task an epoch holds: shares by size, temperature or weight, and how they spread over it.

Free of torch. A task is a named source; a mixture's epoch is as long as the shares allow until the first task has no
more rows to give (its examples times its repeats, or its cap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from training.errors import Problem, TenureError, fail
from training.spec import Data


@dataclass(frozen=True)
class Task:
    """A named source's part of an epoch.

    Attributes:
        first: the index of its first example, and `size` how many it has.
        rows: how many rows an epoch takes of it, more than `size` where they are repeated.
        asked: the share of an epoch's rows that was asked for, what the minimum adds included.
    """

    name: str
    first: int
    size: int
    rows: int
    asked: float


def tasks_of(data: Data, sizes: Sequence[int], per_batch: int) -> tuple[Task, ...]:
    """The tasks of a run, or none where neither a source is named nor a mixture asked for.

    Args:
        sizes: examples of every source.
        per_batch: training rows in a global batch.

    Raises:
        TenureError: a task has no rows, or too few for its share or for the minimum.
    """
    if data.mixture is None and not any(source.name for source in data.train):
        return ()
    _expect_rows(data, sizes)
    rows, asked = _mixed(data, sizes, per_batch) if data.mixture else (list(sizes), _shares(sizes))
    firsts = [0, *accumulate(sizes)]
    names = [source.task for source in data.train]
    return tuple(Task(*values) for values in zip(names, firsts, sizes, rows, asked, strict=False))


def _expect_rows(data: Data, sizes: Sequence[int]) -> None:
    empty = [
        Problem(f"task '{source.task}' has no rows", f"data.train[{index}]", "give it rows, or remove it")
        for index, (source, size) in enumerate(zip(data.train, sizes, strict=True))
        if size == 0
    ]
    if empty:
        raise TenureError(empty)


def _mixed(data: Data, sizes: Sequence[int], per_batch: int) -> tuple[list[int], list[float]]:
    """Rows of every task in an epoch, and the shares asked for."""
    assert data.mixture is not None
    minimum = data.mixture.minimum
    asked = at_least(_wanted(data, sizes), minimum / per_batch)
    given = [
        min(size * source.repeats, source.cap or size * source.repeats)
        for source, size in zip(data.train, sizes, strict=True)
    ]
    # A share is a rounded number: without the nudge a whole number of rows could fall one short.
    total = min(math.floor(rows / share * (1 + 1e-12)) for rows, share in zip(given, asked, strict=True))
    if minimum:
        total = total // per_batch * per_batch  # a short batch at the end has no room for every task's minimum
        _expect_minimum(data, given, total, minimum)
    rows = _rounded([share * total for share in asked], given, total)
    _expect_all_seen(data, rows, asked, total)
    return rows, asked


def _wanted(data: Data, sizes: Sequence[int]) -> list[float]:
    """Shares before the minimum. A capped task counts as no larger than its cap, as in T5 (arXiv 1910.10683, 3.5.2)."""
    mixture = data.mixture
    assert mixture is not None
    if mixture.by == "weight":
        return _shares([source.weight or 1.0 for source in data.train])
    counted = [min(size, source.cap or size) for source, size in zip(data.train, sizes, strict=True)]
    if mixture.by == "size":
        return _shares(counted)
    assert mixture.temperature is not None
    # Relative to the largest, so that a low temperature does not overflow.
    return _shares([(count / max(counted)) ** (1 / mixture.temperature) for count in counted])


def _shares(parts: Sequence[float]) -> list[float]:
    return [part / sum(parts) for part in parts]


def at_least(shares: Sequence[float], least: float) -> list[float]:
    """Shares of which none is below `least`: the small ones are lifted, the others give in proportion."""
    lifted = {index for index, share in enumerate(shares) if share < least}
    while lifted:
        left = 1 - least * len(lifted)
        others = sum(share for index, share in enumerate(shares) if index not in lifted)
        scaled = [least if i in lifted else share * left / others for i, share in enumerate(shares)]
        below = {index for index, share in enumerate(scaled) if share < least * (1 - 1e-12)}
        if not below:
            return scaled
        lifted |= below
    return list(shares)


def _rounded(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers of that total, each within one of what is wanted and none above its most."""
    rows = [min(math.floor(value + 1e-9), limit) for value, limit in zip(wanted, most, strict=True)]
    by_remainder = sorted(range(len(rows)), key=lambda index: rows[index] - wanted[index])
    for index in by_remainder:
        if sum(rows) < total and rows[index] < most[index]:
            rows[index] += 1
    return rows


def _expect_minimum(data: Data, given: Sequence[int], total: int, minimum: int) -> None:
    if total:
        return
    few = min(range(len(given)), key=lambda index: given[index])
    what = f"task '{data.train[few].task}' has {given[few]} rows an epoch, too few for one batch of the mixture"
    instead = f"lower data.mixture.minimum: {minimum}, raise the task's repeats or cap, or give it more rows"
    raise fail(what, f"data.train[{few}]", instead)


def _expect_all_seen(data: Data, rows: Sequence[int], asked: Sequence[float], total: int) -> None:
    unseen = [
        Problem(
            f"task '{source.task}' is asked for {asked[index]:.3%} of an epoch of {total:,} rows, which is not one row",
            f"data.train[{index}]",
            "raise its weight, set data.mixture.minimum: 1, or raise the repeats of the task that ends the epoch",
        )
        for index, source in enumerate(data.train)
        if rows[index] == 0
    ]
    if unseen:
        raise TenureError(unseen)


def spread(rows: Sequence[int], places: int) -> list[int]:
    """How many rows of every task stand among the first `places` of an epoch, each task's at even distances.

    Row j of a task with m rows stands (j + 1/2) / m of the way through the epoch; of two at the same point, that of the
    earlier task comes first. So a stretch of the epoch holds every task's share of it, to about one row.
    """
    total = sum(rows)
    if total == 0:
        return [0] * len(rows)
    taken = [(2 * count * places + total) // (2 * total) for count in rows]
    while sum(taken) < places:
        ahead = [(Fraction(2 * taken[i] + 1, 2 * rows[i]), i) for i in range(len(rows)) if taken[i] < rows[i]]
        taken[min(ahead)[1]] += 1
    while sum(taken) > places:
        behind = [(Fraction(2 * taken[i] - 1, 2 * rows[i]), i) for i in range(len(rows)) if taken[i] > 0]
        taken[max(behind)[1]] -= 1
    return taken
