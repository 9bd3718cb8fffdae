"""Changes, intervals and verdicts from two models' answers, with known results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from training.evaluation.contract import judge
from training.evaluation.judge import package_versions, score_suite
from training.evaluation.scorecard import SuiteScore
from training.evaluation.scoring import Answered
from training.spec import Contract, CrossEntropy, ExactMatch
from training.suite_spec import AnySuite

CONTRACT = Contract(min_gain=0.25, max_loss=0.1)


def exact(**fields: Any) -> ExactMatch:
    return ExactMatch(name="sums", path=Path("f"), metric="exact_match", prompt="q", completion="a", **fields)


def entropy(**fields: Any) -> CrossEntropy:
    return CrossEntropy(name="text", path=Path("f"), metric="cross_entropy", text="t", **fields)


def answers(scores: list[float], weights: list[float] | None = None) -> list[Answered]:
    pairs = zip(scores, weights or [1.0] * len(scores), strict=True)
    return [Answered(f"q{n}", "right", f"said {score}", score, weight) for n, (score, weight) in enumerate(pairs)]


def scored(
    base: list[float],
    tuned: list[float],
    suite: AnySuite | None = None,
    role: Literal["target", "retention"] = "target",
    weights: list[float] | None = None,
) -> SuiteScore:
    return score_suite(suite or exact(), role, answers(base, weights), answers(tuned, weights), CONTRACT)


def test_a_gain_in_exact_match_is_the_difference_of_shares() -> None:
    score = scored([0, 0, 1, 0], [1, 1, 1, 0])
    assert (score.base, score.tuned, score.change) == (0.25, 0.75, 0.5)
    assert (score.higher_is_better, score.unit, score.threshold, score.kept) == (True, "share", 0.25, True)


def test_a_cross_entropy_is_weighted_by_bytes_and_falls_when_it_improves() -> None:
    score = scored([1.0, 2.0], [0.5, 2.2], entropy(), "retention", weights=[30.0, 10.0])
    assert score.base == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
    assert score.tuned == pytest.approx((30 * 0.5 + 10 * 2.2) / 40)
    assert score.change == pytest.approx(score.base - score.tuned) == pytest.approx(0.325)
    assert (score.higher_is_better, score.unit, score.kept) == (False, "nats per byte", True)


@pytest.mark.parametrize(
    ("suite", "role", "base", "tuned", "kept"),
    [
        (exact(), "target", [0, 0, 0, 0], [1, 0, 0, 0], True),  # gains the promised 0.25 exactly
        (exact(), "target", [0] * 5, [1, 0, 0, 0, 0], False),
        (exact(min_gain=0.2), "target", [0] * 5, [1, 0, 0, 0, 0], True),
        (exact(min_gain=0.0), "target", [1, 1], [1, 1], True),
        (exact(min_gain=0.0), "target", [1, 1], [1, 0], False),
        (exact(), "retention", [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0], False),  # loses 0.125 of an allowed 0.1
        (exact(max_loss=0.125), "retention", [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0], True),
        (exact(), "retention", [0, 0], [1, 1], True),
        (entropy(), "retention", [1.0, 1.0], [1.0, 1.25], False),  # loses 0.125
        (entropy(), "retention", [1.0, 1.0], [1.0, 1.125], True),
        (entropy(max_loss=0.0), "retention", [1.0, 1.0], [1.0, 1.0], True),
        (entropy(), "target", [1.0, 1.0], [0.5, 1.0], True),
    ],
)
def test_a_promise_is_kept_up_to_its_threshold(
    suite: AnySuite, role: Literal["target", "retention"], base: list[float], tuned: list[float], kept: bool
) -> None:
    assert scored(base, tuned, suite, role).kept == kept


def test_a_verdict_tells_every_broken_promise() -> None:
    kept = scored([0, 0], [1, 1])
    no_gain = scored([0, 0, 0, 0], [0, 0, 0, 0])
    lost = scored([1.0, 1.0], [1.0, 1.5], entropy(), "retention")
    assert judge((kept,), CONTRACT).verdict == "kept"
    assert judge((kept,), CONTRACT).reasons == ()
    verdict = judge((kept, no_gain, lost), CONTRACT)
    assert (verdict.verdict, verdict.min_gain, verdict.max_loss) == ("broken", 0.25, 0.1)
    assert verdict.reasons == (
        "sums gained 0.0000 (share), less than the promised 0.2500",
        "text lost 0.2500 (nats per byte), more than the allowed 0.1000",
    )


def test_items_hold_both_answers_in_order() -> None:
    items = scored([0, 1], [1, 0.5], weights=[2.0, 3.0]).items
    assert [item.index for item in items] == [0, 1]
    assert [(item.base_answer, item.tuned_answer) for item in items] == [("said 0", "said 1"), ("said 1", "said 0.5")]
    assert [(item.base_score, item.tuned_score, item.weight) for item in items] == [(0.0, 1.0, 2.0), (1.0, 0.5, 3.0)]


def test_suites_of_unlike_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        scored([0.0, 1.0], [1.0])


def test_the_same_answers_give_no_change_and_no_interval() -> None:
    score = scored([0.3, 1.7, 0.2], [0.3, 1.7, 0.2], entropy(), "retention", weights=[3.0, 5.0, 7.0])
    assert (score.change, score.interval) == (0.0, (0.0, 0.0))


def test_versions_are_of_installed_packages_alone() -> None:
    versions = package_versions()
    assert versions["torch"].startswith("2.")
    assert "no-such-package" not in versions
