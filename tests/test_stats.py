"""Intervals that cover as often as they say, and tests against exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluation.stats import (
    bootstrap_interval,
    discordant,
    holm,
    items_to_decide,
    items_to_see,
    mcnemar,
    p_value,
    paired_interval,
    pooled_interval,
    score_interval,
    sign_flip,
)

EXPERIMENTS = 2_000
Draw = Callable[[np.random.Generator], np.ndarray]


def coverage(draw: Draw, interval: Callable[[np.ndarray], tuple[float, float]], truth: float) -> float:
    """The share of simulated experiments whose interval holds the truth."""
    generator = np.random.default_rng(3)
    found = [interval(draw(generator)) for _ in range(EXPERIMENTS)]
    return sum(low <= truth <= high for low, high in found) / EXPERIMENTS


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda g: g.choice([-1.0, 0.0, 1.0], size=40, p=[0.1, 0.6, 0.3]), 0.2),
        (lambda g: g.normal(-0.03, 0.1, 40), -0.03),
        (lambda g: g.gamma(4.0, 0.25, 50) - 0.5, 0.5),
    ],
    ids=["right and wrong", "few items", "skewed"],
)
def test_bootstrap_intervals_cover_the_truth_in_95_percent_of_experiments(draw: Draw, truth: float) -> None:
    weights = np.random.default_rng(1).uniform(1.0, 3.0, 80)
    share = coverage(draw, lambda gains: bootstrap_interval(gains, weights[: len(gains)], resamples=500), truth)
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize(("lost", "won", "count"), [(0.10, 0.10, 60), (0.06, 0.02, 150), (0.15, 0.30, 40)])
def test_score_intervals_cover_the_truth_in_95_percent_of_experiments(lost: float, won: float, count: int) -> None:
    def draw(generator: np.random.Generator) -> np.ndarray:
        return generator.choice([-1.0, 0.0, 1.0], size=count, p=[lost, 1 - lost - won, won])

    share = coverage(draw, lambda gains: score_interval(*discordant(gains), count), won - lost)
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
def test_pooled_intervals_cover_the_truth_in_95_percent_of_experiments(seeds: int) -> None:
    """Seeds, items and their meeting all vary; the true change is 0.1."""

    def draw(generator: np.random.Generator) -> np.ndarray:
        of_seeds, of_items = generator.normal(0, 0.05, (seeds, 1)), generator.normal(0, 0.3, (1, 60))
        return 0.1 + of_seeds + of_items + generator.normal(0, 0.3, (seeds, 60))

    assert 0.93 <= coverage(draw, lambda gains: pooled_interval(gains, np.ones(60)), 0.1) <= 0.975


def test_seeds_that_are_pooled_as_if_their_items_were_independent_are_too_sure() -> None:
    generator = np.random.default_rng(0)
    gains = np.repeat(generator.normal(0.0, 1.0, (1, 50)), 4, axis=0)  # four seeds that answer alike
    low, high = pooled_interval(gains, np.ones(50))
    naive_low, naive_high = bootstrap_interval(gains.ravel(), np.ones(200))
    alone_low, alone_high = bootstrap_interval(gains[0], np.ones(50))
    assert high - low == pytest.approx(alone_high - alone_low, rel=0.1)
    assert (high - low) / (naive_high - naive_low) == pytest.approx(2.0, rel=0.1)


def test_one_seed_gives_the_interval_over_its_items() -> None:
    gains = np.random.default_rng(0).normal(0.0, 1.0, (1, 50))
    assert pooled_interval(gains, np.ones(50)) == bootstrap_interval(gains[0], np.ones(50))


def test_seeds_and_items_that_all_agree_leave_no_doubt() -> None:
    assert pooled_interval(np.full((3, 10), 0.25), np.ones(10)) == (0.25, 0.25)


def test_a_constant_change_has_an_interval_of_one_point() -> None:
    assert bootstrap_interval(np.full(20, 0.5), np.arange(1.0, 21.0)) == pytest.approx((0.5, 0.5))


def test_an_interval_is_the_same_each_time_and_holds_the_change() -> None:
    generator = np.random.default_rng(1)
    gains, weights = generator.normal(0.1, 1.0, 80), generator.uniform(1.0, 9.0, 80)
    low, high = bootstrap_interval(gains, weights)
    assert bootstrap_interval(gains, weights) == (low, high)
    assert bootstrap_interval(gains, weights, seed=1) != (low, high)
    assert low < np.average(gains, weights=weights) < high


def test_an_interval_is_as_wide_as_the_normal_one_on_many_items() -> None:
    gains = np.random.default_rng(2).normal(0.0, 1.0, 400)
    low, high = bootstrap_interval(gains, np.ones(400))
    assert high - low == pytest.approx(2 * 1.96 * gains.std() / 20, rel=0.05)


def test_one_item_says_next_to_nothing() -> None:
    assert paired_interval(np.array([0.3]), np.ones(1)) == ((0.3, 0.3), "none")
    (low, high), method = paired_interval(np.array([-1.0]), np.ones(1))
    assert (low, method) == (-1.0, "score")
    assert high > 0


def test_nothing_lost_in_few_items_is_no_proof() -> None:
    """With no changed pair Tango's interval is z^2 / (n + z^2) to both sides."""
    interval, method = paired_interval(np.zeros(100), np.ones(100))
    z2 = 1.959963984540054**2
    assert method == "score"
    assert interval == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))


def test_nats_are_never_right_or_wrong() -> None:
    """Texts alike in length, none of which changed: no share of items stands behind that."""
    assert paired_interval(np.zeros(12), np.ones(12), shares=False) == ((0.0, 0.0), "bootstrap")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(25, 300))
def test_a_score_interval_holds_the_estimate_and_turns_with_the_sign(won: int, lost: int, count: int) -> None:
    low, high = score_interval(won, lost, count)
    assert low < (won - lost) / count < high
    assert score_interval(lost, won, count) == pytest.approx((-high, -low), abs=1e-9)


def test_many_changed_pairs_or_graded_scores_are_resampled() -> None:
    many = np.array([1.0] * 20 + [-1.0] * 20 + [0.0] * 60)
    assert paired_interval(many, np.ones(100))[1] == "bootstrap"
    assert paired_interval(np.full(10, 0.1), np.ones(10))[1] == "bootstrap"


def test_mcnemar_is_exact_for_few_pairs() -> None:
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_mcnemar_of_many_pairs_is_the_corrected_chi_squared() -> None:
    statistic = (abs(10 - 25) - 1) ** 2 / 35
    assert mcnemar(10, 25) == pytest.approx(math.erfc(math.sqrt(statistic / 2)))
    assert mcnemar(20, 20) == 1.0


def test_flipping_signs_counts_the_outcomes_at_least_as_far_out() -> None:
    """Five equal gains: of the 32 ways to set their signs two are as far out."""
    assert sign_flip(np.full(5, 0.2), np.ones(5)) == pytest.approx(2 / 32, abs=0.01)
    assert sign_flip(np.zeros(5), np.ones(5)) == 1.0
    assert p_value(np.array([0.5, -0.5]), np.ones(2)) == 1.0


def test_tests_reject_a_true_null_in_at_most_5_percent_of_experiments() -> None:
    generator = np.random.default_rng(4)
    binary = [generator.choice([-1.0, 0.0, 1.0], size=60, p=[0.1, 0.8, 0.1]) for _ in range(EXPERIMENTS)]
    assert sum(p_value(gains, np.ones(60)) < 0.05 for gains in binary) / EXPERIMENTS <= 0.05
    graded = [sign_flip(generator.normal(0, 1, 30), np.ones(30), resamples=400) for _ in range(EXPERIMENTS)]
    assert 0.03 <= sum(p < 0.05 for p in graded) / EXPERIMENTS <= 0.07


def test_holm_multiplies_the_smallest_by_how_many_are_left() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))  # Holm's own steps
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([0.03]) == (0.03,)
    assert holm([]) == ()


def test_items_to_decide_follow_from_the_intervals_width() -> None:
    assert items_to_decide(change=-0.01, end=-0.05, least=-0.02, count=100) == 1600  # four times too wide
    assert items_to_decide(change=-0.02, end=-0.05, least=-0.02, count=100) is None
    assert items_to_decide(change=0.0, end=0.0, least=-0.02, count=1) == 2


def test_items_to_see_a_change_are_cohens() -> None:
    assert items_to_see(0.5, 1.0) == 32  # (1.96 + 0.8416)^2 / 0.25 = 31.4
    assert items_to_see(0.0, 1.0) is None
