"""Front, hypervolume, knee and winner: by hand, as properties, and against Optuna's own hypervolume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_results import finalist, made_up_sweep, point

from sweeps.pareto import (
    best_full,
    choose,
    find_knee,
    hypervolume,
    nominate,
    pareto_front,
    place_of,
    rank,
    volume_over_time,
)
from sweeps.result import Finalist, Point

# Few values, so that ties are common.
numbers = st.one_of(st.integers(-2, 5).map(lambda n: n / 4), st.floats(-1, 1, allow_nan=False))
places = st.lists(st.tuples(numbers, numbers.map(lambda value: min(1.0, value))), max_size=12)


def points(found: list[tuple[float, float]]) -> list[Point]:
    return [point(gain, kept, f"t{index}") for index, (gain, kept) in enumerate(found)]


def test_the_front_by_hand() -> None:
    """(0.4, 0.9) beats (0.4, 0.8) and (0.2, 0.9); (0.3, 0.7) is beaten by all of more gain."""
    found = [(0.1, 1.0), (0.4, 0.8), (0.4, 0.9), (0.6, 0.5), (0.3, 0.7), (0.2, 0.9)]
    assert [place_of(p) for p in pareto_front(points(found))] == [(0.1, 1.0), (0.4, 0.9), (0.6, 0.5)]
    assert pareto_front(points([])) == []


def test_of_points_at_one_place_the_first_stands() -> None:
    assert [p.trial for p in pareto_front(points([(0.5, 0.5), (0.5, 0.5)]))] == ["t0"]


@given(places)
def test_the_front_is_what_no_other_point_dominates(found: list[tuple[float, float]]) -> None:
    def dominated(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in found)

    front = [place_of(p) for p in pareto_front(points(found))]
    assert front == sorted({place for place in found if not dominated(place)})
    assert [kept for _, kept in front] == sorted((kept for _, kept in front), reverse=True)


def test_hypervolume_by_hand() -> None:
    """0.6 x 0.5 below, then 0.4 x (0.9 - 0.5), then 0.1 x (1 - 0.9)."""
    found = [(0.1, 1.0), (0.4, 0.9), (0.6, 0.5), (0.3, 0.7)]
    assert hypervolume(found) == pytest.approx(0.30 + 0.16 + 0.01)
    assert hypervolume(found, (0.2, 0.6)) == pytest.approx(0.2 * 0.3)
    assert hypervolume([]) == hypervolume([(-0.5, 1.0)]) == 0.0


@given(places, st.tuples(numbers, numbers))
def test_hypervolume_is_optunas(found: list[tuple[float, float]], reference: tuple[float, float]) -> None:
    from optuna._hypervolume import compute_hypervolume

    # Optuna minimises, and wants points that are no worse than the reference.
    inside = [(-gain, -kept) for gain, kept in found if gain >= reference[0] and kept >= reference[1]]
    theirs = compute_hypervolume(np.array(inside), -np.array(reference)) if inside else 0.0
    assert hypervolume(found, reference) == pytest.approx(theirs, abs=1e-12)


@given(places, st.tuples(numbers, numbers))
def test_another_point_never_takes_volume_away(found: list[tuple[float, float]], new: tuple[float, float]) -> None:
    before, after = hypervolume(found), hypervolume([*found, new])
    assert after >= before - 1e-12
    front = [place_of(p) for p in pareto_front(points(found))]
    assert hypervolume(front) == pytest.approx(before)


def test_volume_over_time_grows_where_the_front_does() -> None:
    timed = [(3.0, (0.5, 0.5)), (1.0, (0.2, 1.0)), (2.0, (0.1, 0.9))]
    assert volume_over_time(timed) == [(1.0, pytest.approx(0.2)), (3.0, pytest.approx(0.2 + 0.3 * 0.5))]


def test_the_knee_by_hand() -> None:
    """Between (0, 1) and (1, 0): (0.5, 0.9) lies 0.5 - 0.1 = 0.4 above the line, (0.8, 0.5) lies 0.3."""
    front = pareto_front(points([(0.0, 1.0), (0.5, 0.9), (0.8, 0.5), (1.0, 0.0)]))
    knee = find_knee(front)
    assert knee is not None
    assert place_of(knee) == (0.5, 0.9)


def test_a_straight_or_hollow_front_has_no_knee() -> None:
    assert find_knee(pareto_front(points([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]))) is None
    assert find_knee(pareto_front(points([(0.0, 1.0), (0.4, 0.5), (1.0, 0.0)]))) is None
    assert find_knee(pareto_front(points([(0.0, 1.0), (1.0, 0.0)]))) is None


@given(places, st.floats(0.1, 10))
def test_the_knee_does_not_depend_on_the_unit_of_the_gain(found: list[tuple[float, float]], scale: float) -> None:
    def heights(front: list[Point], knee: Point) -> float:
        (g0, r0), (g1, r1), (g, r) = place_of(front[0]), place_of(front[-1]), place_of(knee)
        return (g - g0) / (g1 - g0) - (r0 - r) / (r0 - r1)

    found = [(round(g, 3), round(r, 3)) for g, r in found]
    front = pareto_front(points(found))
    scaled = pareto_front(points([(gain * scale, kept) for gain, kept in found]))
    knee, other = find_knee(front), find_knee(scaled)
    assert (knee is None) == (other is None)
    if knee and other:
        assert heights(front, knee) == pytest.approx(heights(scaled, other))


def test_the_contract_ranks_before_gain() -> None:
    ranked = rank([point(0.9, 0.5, "broken", "broken"), point(0.3, 1.0, "kept"), point(0.5, 0.9, "open", "undecided")])
    assert [p.trial for p in ranked] == ["kept", "open", "broken"]


def test_the_winner_gains_most_of_those_that_keep_the_contract() -> None:
    choice = choose(
        [
            finalist(0.9, 0.6, "a", "broken"),
            finalist(0.5, 0.97, "b"),
            finalist(0.3, 1.0, "c"),
            finalist(0.8, 0.99, "d", split="test"),
        ]
    )
    assert choice.best is not None
    assert choice.best.trial == "b"
    assert "gains most of the 2 of 3" in choice.reason
    assert "overlaps" not in choice.reason
    assert [other.trial for other in choice.runners_up] == ["c", "a"]


def test_a_winner_by_chance_is_told_of() -> None:
    close = choose([finalist(0.5, 0.97, "a"), finalist(0.48, 0.99, "b", alpha=0.5)])
    assert "overlaps with that of b at alpha 0.5" in close.reason


def test_nothing_that_keeps_the_contract() -> None:
    undecided = choose([finalist(0.5, 0.95, "a", "undecided"), finalist(0.6, 0.5, "b", "broken")])
    assert undecided.best is not None
    assert undecided.best.trial == "a"
    assert "no finalist surely keeps" in undecided.reason
    broken = choose([finalist(0.6, 0.5, "b", "broken")])
    assert broken.best is None
    assert [other.trial for other in broken.runners_up] == ["b"]
    assert choose([]).best is None


def test_nominees_are_of_several_strategies_and_one_a_trial() -> None:
    found = [
        point(0.9, 0.99, "a", strategy="full"),
        point(0.8, 0.99, "a", strategy="full", alpha=0.5),
        point(0.7, 0.99, "b", strategy="full"),
        point(0.5, 0.99, "c", strategy="lora"),
        point(0.95, 0.5, "d", "broken", strategy="ewc"),
    ]
    assert [p.trial for p in nominate(found, 3)] == ["a", "c", "b"]
    assert [p.trial for p in nominate(found, 9)] == ["a", "c", "b", "d"]
    assert [p.trial for p in nominate(found, 1, full_strategy="ewc")] == ["a", "d"]
    assert [p.trial for p in nominate(found, 1, full_strategy="full")] == ["a"]


def test_the_best_full_tuning_is_pooled_where_it_can_be() -> None:
    result = made_up_sweep()
    whole = best_full(result)
    assert whole is not None
    assert whole.strategy == "full"
    assert best_full(result.model_copy(update={"full_strategy": None})) is None
    most = max(p.gain.value for p in result.points if p.strategy == "full")
    assert whole.gain.value == most
    assert len(whole.seeds if isinstance(whole, Finalist) else ()) == 3
    assert best_full(result.model_copy(update={"finalists": ()})) in result.points
