"""The trade of gain against retention: the Pareto front, its hypervolume and knee, and the winner under a contract.

Both are maximised; a place is (gain, retention). Only points of the validation split are chosen from: test is for
telling how good the winner is, not which one it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sweeps.result import Finalist, Point, SweepResult

Place = tuple[float, float]
Scored = TypeVar("Scored", Point, Finalist)
# A model that learned nothing and kept nothing: the volume is the mean retention kept, over the gain reached.
REFERENCE: Place = (0.0, 0.0)


def place_of(scored: Point | Finalist) -> Place:
    """(gain, least retention)."""
    return scored.gain.value, scored.retention.value


def on_validation(points: Iterable[Scored]) -> list[Scored]:
    return [point for point in points if point.split == "validation"]


def pareto_front(points: Iterable[Scored]) -> list[Scored]:
    """The points that no other one is at least as good as in both and better in one, gain ascending.

    Of points at one place the first one given stands for all.
    """
    front: list[Scored] = []
    best = float("-inf")
    # From the largest gain down, a point is on the front where it keeps more than any before. Sorting is stable.
    for point in sorted(points, key=lambda point: (-point.gain.value, -point.retention.value)):
        if point.retention.value > best:
            front.append(point)
            best = point.retention.value
    return front[::-1]


def hypervolume(places: Iterable[Place], reference: Place = REFERENCE) -> float:
    """The area that the places dominate above the reference, in the gain's unit; exact, by one sweep over the gains.

    Places that are not above the reference in both add nothing. Source: Zitzler and Thiele, IEEE Transactions on
    Evolutionary Computation 3(4), 1999, pages 257 to 271.
    """
    area, height = 0.0, reference[1]
    for gain, retention in sorted(places, reverse=True):
        if gain > reference[0] and retention > height:
            area += (gain - reference[0]) * (retention - height)
            height = retention
    return area


def volume_over_time(timed: Iterable[tuple[float, Place]], reference: Place = REFERENCE) -> list[tuple[float, float]]:
    """(time, hypervolume of all places up to then), times ascending, one entry where the volume grew."""
    curve: list[tuple[float, float]] = []
    seen: list[Place] = []
    for time, place in sorted(timed):
        seen.append(place)
        volume = hypervolume(seen, reference)
        if not curve or volume > curve[-1][1]:
            curve.append((time, volume))
    return curve


def find_knee(front: Sequence[Scored]) -> Scored | None:
    """The point of a front farthest above the straight line between its ends, each axis from 0 to 1 along it.

    As on the curve of WiSE-FT, where it is the share of the gain less the share of the loss. None when no point lies
    above the line; of two alike the one with less gain. Source: Satopaa et al., "Finding a Kneedle in a Haystack",
    2011.
    """
    if len(front) < 3:
        return None
    (least, most_kept), (most, least_kept) = place_of(front[0]), place_of(front[-1])
    heights = [
        (point.gain.value - least) / (most - least) - (most_kept - point.retention.value) / (most_kept - least_kept)
        for point in front
    ]
    highest = max(heights)
    return front[heights.index(highest)] if highest > 1e-9 else None


# Verdicts, best first.
ORDER = {"kept": 0, "undecided": 1, "broken": 2}


def rank(points: Iterable[Scored]) -> list[Scored]:
    """Best first: by verdict (kept, undecided, broken), then by gain, then by retention."""
    return sorted(points, key=lambda p: (ORDER[p.contract], -p.gain.value, -p.retention.value))


def nominate(points: Sequence[Point], count: int, full_strategy: str | None = None) -> list[Point]:
    """The points whose settings are to be run again under more seeds: the best of each trial, at most `count`.

    The best of every strategy come before the second best of any, for the final is between strategies; none that breaks
    the contract is nominated while another one does not. The best plain full tuning comes besides, since gains are told
    as shares of its own.
    """
    if not count:
        return []
    best_of_trial: dict[str, Point] = {}
    for point in rank(on_validation(points)):
        best_of_trial.setdefault(point.trial, point)
    turns: dict[str, int] = {}
    order: list[tuple[int, int, int, Point]] = []
    for place, point in enumerate(best_of_trial.values()):
        turn = turns.get(point.strategy, 0)
        turns[point.strategy] = turn + 1
        order.append((ORDER[point.contract], turn, place, point))
    chosen = [point for *_, point in sorted(order, key=lambda entry: entry[:3])[:count]]
    full = _best_of(points, full_strategy)
    return [*chosen, full] if full and full not in chosen else chosen


@dataclass(frozen=True)
class Choice:
    """The best of the finalists (None when all break the contract), why, and the others, best first."""

    best: Finalist | None
    reason: str
    runners_up: tuple[Finalist, ...]


def choose(finalists: Iterable[Finalist]) -> Choice:
    """The finalist with the largest gain of those that keep the contract on validation, pooled over their seeds.

    Where none keeps it but some are undecided, the best of those, and the reason says so; where all break it, none.
    """
    ranked = rank(on_validation(finalists))
    if not ranked:
        return Choice(None, "no setting was scored on validation", ())
    best, *others = ranked
    if best.contract == "broken":
        return Choice(None, f"all {len(ranked)} finalists break the contract", tuple(ranked))
    return Choice(best, _why(best, others), tuple(others))


def told_apart(best: Finalist, other: Finalist) -> bool:
    """Whether the gains' intervals leave each other out; cautious, for both were scored on the same items."""
    return best.gain.low > other.gain.high or other.gain.low > best.gain.high


def _why(best: Finalist, others: Sequence[Finalist]) -> str:
    rivals = [other for other in others if other.contract == best.contract]
    alike = [other for other in rivals if not told_apart(best, other)]
    if best.contract == "undecided":
        reason = "no finalist surely keeps the contract; this one gains most of those that do not surely break it"
    elif not others:
        reason = "it keeps the contract, and is the only finalist"
    else:
        reason = f"it gains most of the {len(rivals) + 1} of {len(others) + 1} finalists that keep the contract"
    if alike:
        told = ", ".join(dict.fromkeys(name_of(other) for other in alike))
        reason += f"; its interval of gain overlaps with that of {told}, so the order may be chance"
    return reason


def name_of(scored: Point | Finalist) -> str:
    """The trial, and where it was interpolated its alpha."""
    return scored.trial if scored.alpha is None else f"{scored.trial} at alpha {scored.alpha:g}"


def best_full(result: SweepResult) -> Point | Finalist | None:
    """The plain full tuning with the largest gain on validation, whatever it forgot: what a gain is a share of.

    Pooled over seeds where it was run under several. None where the sweep has no plain full tuning.
    """
    best = _best_of(result.points, result.full_strategy)
    if best is None:
        return _best_of(result.finalists, result.full_strategy)
    pooled = (one for one in on_validation(result.finalists) if (one.trial, one.alpha) == (best.trial, best.alpha))
    return next(pooled, best)


def _best_of(scored: Iterable[Scored], strategy: str | None) -> Scored | None:
    whole = [one for one in on_validation(scored) if one.strategy == strategy and one.alpha in (None, 1.0)]
    return max(whole, key=lambda one: one.gain.value, default=None)
