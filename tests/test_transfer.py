"""Gain, retention and the accuracy matrix against figures worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction as F

import numpy as np
import pytest

from training.errors import TenureError
from training.evaluation import transfer
from training.evaluation.transfer import Kept

# Three tasks. Rows: after task 1, 2, 3. Columns: score on task 1, 2, 3.
R = [
    [0.90, 0.20, 0.10],
    [0.70, 0.80, 0.30],
    [0.60, 0.85, 0.95],
]
UNTRAINED = [0.10, 0.15, 0.20]
NAN = math.nan


def test_average_accuracy_is_the_last_rows_mean() -> None:
    assert transfer.average_accuracy(R) == pytest.approx(float(F(60 + 85 + 95, 300)))


def test_backward_transfer_compares_the_end_with_the_moment_of_learning() -> None:
    assert transfer.backward_transfer(R) == pytest.approx(((0.60 - 0.90) + (0.85 - 0.80)) / 2)  # -0.125


def test_forward_transfer_is_over_the_untrained_model_just_before_learning() -> None:
    assert transfer.forward_transfer(R, UNTRAINED) == pytest.approx(((0.20 - 0.15) + (0.30 - 0.20)) / 2)  # 0.075


def test_forgetting_is_the_way_down_from_the_best_earlier_score() -> None:
    assert transfer.forgetting_per_task(R) == pytest.approx([0.90 - 0.60, 0.80 - 0.85])
    assert transfer.forgetting(R) == pytest.approx(0.125)


def test_forgetting_starts_at_the_best_and_backward_transfer_at_the_first() -> None:
    matrix = [[0.5, 0.0, 0.0], [0.7, 0.6, 0.0], [0.4, 0.6, 0.9]]
    assert transfer.forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)
    assert transfer.backward_transfer(matrix) == pytest.approx((-0.1 + 0.0) / 2)


def test_a_model_that_learns_nothing_transfers_and_forgets_nothing() -> None:
    flat = np.tile([0.3, 0.5, 0.2, 0.9], (4, 1))
    assert transfer.backward_transfer(flat) == transfer.forgetting(flat) == 0.0
    assert transfer.forward_transfer(flat, flat[0]) == 0.0


def test_the_last_task_alone_is_not_forgotten() -> None:
    assert transfer.forgetting([[1.0, 0.0], [0.25, 1.0]]) == 0.75


def test_a_lower_triangle_suffices_for_all_but_forward_transfer() -> None:
    matrix = [[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.6, 0.85, 0.95]]
    assert transfer.backward_transfer(matrix) == pytest.approx(-0.125)
    assert transfer.forgetting(matrix) == pytest.approx(0.125)
    with pytest.raises(TenureError, match="forward transfer needs scores that were never measured"):
        transfer.forward_transfer(matrix, UNTRAINED)
    assert transfer.summarise(matrix, UNTRAINED).forward_transfer is None


def test_a_hole_in_what_was_learned_is_told() -> None:
    with pytest.raises(TenureError, match="forgetting needs scores that were never measured"):
        transfer.forgetting([[0.9, 0.1, 0.1], [NAN, 0.8, 0.1], [0.6, 0.85, 0.95]])
    with pytest.raises(TenureError, match="average accuracy needs scores"):
        transfer.average_accuracy([[0.9, 0.1], [0.9, NAN]])


def test_a_summary_holds_all_five_figures() -> None:
    summary = transfer.summarise(R, UNTRAINED)
    assert summary.average_accuracy == pytest.approx(0.8)
    assert summary.backward_transfer == pytest.approx(-0.125)
    assert summary.forward_transfer == pytest.approx(0.075)
    assert (summary.forgetting, summary.num_tasks) == (pytest.approx(0.125), 3)
    alone = transfer.summarise([[0.4]], [0.1])
    assert (alone.average_accuracy, alone.backward_transfer, alone.forward_transfer) == (0.4, None, None)


def test_matrices_that_are_none_are_refused() -> None:
    with pytest.raises(TenureError, match="as many rows as columns"):
        transfer.average_accuracy([[0.1, 0.2]])
    with pytest.raises(TenureError, match="1 tasks are too few"):
        transfer.backward_transfer([[0.1]])
    with pytest.raises(TenureError, match="3 tasks have 2 untrained scores"):
        transfer.forward_transfer(R, [0.1, 0.2])


def test_general_ability_is_the_mean_change() -> None:
    assert transfer.general_ability_delta([0.5, 0.4, 0.6], [0.4, 0.4, 0.3]) == pytest.approx(-0.4 / 3)
    with pytest.raises(TenureError, match="2 suites before and 1 after"):
        transfer.general_ability_delta([0.5, 0.4], [0.4])


def test_gain_is_the_share_of_full_tunings_gain() -> None:
    assert transfer.gain(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert transfer.gain(0.8, 0.2, 0.8) == 1.0
    assert transfer.gain(1.5, 2.0, 1.0) == pytest.approx(0.5)  # a cross-entropy, lower is better
    with pytest.raises(TenureError, match="full tuning gained nothing"):
        transfer.gain(0.5, 0.2, 0.2)


def test_a_loss_is_positive_when_something_was_lost() -> None:
    assert transfer.loss(0.8, 0.6) == pytest.approx(0.2)
    assert transfer.loss(1.0, 1.3, higher_is_better=False) == pytest.approx(0.3)
    assert transfer.loss(0.6, 0.8) == pytest.approx(-0.2)


def test_chance_is_nothing_known() -> None:
    assert transfer.chance_corrected(0.25, 0.25) == 0.0
    assert transfer.chance_corrected(1.0, 0.25) == 1.0
    assert transfer.chance_corrected(0.4, 0.25) == pytest.approx(0.2)


def test_retention_is_chance_corrected_and_clipped() -> None:
    suites = [Kept("four choices", 0.55, 0.40, 0.25), Kept("skill", 0.50, 0.60)]
    assert suites[0].ratio == pytest.approx(0.15 / 0.30)
    assert transfer.retention(suites) == pytest.approx((0.5 + 1.0) / 2)
    assert transfer.retention(suites, clipped=False) == pytest.approx((0.5 + 1.2) / 2)


def test_what_falls_below_chance_counts_as_less_than_nothing() -> None:
    assert transfer.retention([Kept("yes or no", 0.75, 0.40, 0.5)]) == pytest.approx(-0.4)


def test_a_suite_at_chance_has_nothing_to_retain() -> None:
    with pytest.raises(TenureError, match=r"four choices: the base scores 0\.2500 where chance gives 0\.2500"):
        transfer.retention([Kept("four choices", 0.25, 0.25, 0.25)])
    with pytest.raises(TenureError, match="retention needs at least one score"):
        transfer.retention([])


def test_a_divergence_is_that_of_the_formula() -> None:
    base, tuned = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert transfer.kl_divergence(base, tuned) == pytest.approx([by_hand, 0.0])


def test_a_token_that_the_base_never_says_adds_nothing() -> None:
    with np.errstate(divide="ignore"):
        base = np.log([1.0, 0.0])
    assert transfer.kl_divergence(base, np.log([0.5, 0.5])) == pytest.approx(math.log(2))


def test_a_bucket_for_the_rest_gives_a_lower_bound() -> None:
    generator = np.random.default_rng(0)
    base, tuned = generator.dirichlet(np.ones(50), 20), generator.dirichlet(np.ones(50), 20)
    whole = transfer.kl_divergence(np.log(base), np.log(tuned))
    top = np.argsort(-base, axis=-1)[:, :10]
    kept = [np.take_along_axis(p, top, axis=-1) for p in (base, tuned)]
    buckets = [np.log(np.concatenate([p, 1 - p.sum(axis=-1, keepdims=True)], axis=-1)) for p in kept]
    part = transfer.kl_divergence(*buckets)
    assert (part >= 0).all()
    assert (part <= whole + 1e-12).all()


def test_nats_per_token_follow_from_nats_per_byte() -> None:
    assert transfer.nats_per_token(0.5, 40.0, 10) == 2.0
