"""Gain and retention of a scored model against their formulas by hand; seeds pooled; results written and read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_contract import BY_INTERVAL, entropy, exact, scored

from sweeps.measures import Measures, least_of, mean_of, measure, pool, suite_retention
from sweeps.result import Dimension, Measured, SweepResult, Trial, read_result, write_result
from training.errors import TenureError
from training.evaluation.contract import judge
from training.evaluation.overall import promises
from training.evaluation.scorecard import Scorecard, SuiteScore
from training.spec import Contract


def card(*suites: SuiteScore, contract: Contract = BY_INTERVAL, protocol: str = "p") -> Scorecard:
    verdict = judge(suites, contract, promises(suites, contract))
    return Scorecard.model_construct(
        run="r", suites=suites, contract=verdict, protocol={"few_shot": protocol}, protocol_hash=protocol
    )


def target(base: float, tuned: float, items: int = 100, **fields: Any) -> SuiteScore:
    return scored(shares(base, items), shares(tuned, items), role="target", suite=exact("skill"), **fields)


def shares(score: float, items: int = 100) -> list[float]:
    return [1.0] * round(score * items) + [0.0] * (items - round(score * items))


def test_retention_is_corrected_for_chance_and_never_above_one() -> None:
    rho = suite_retention(scored(shares(0.85), shares(0.7), chance=0.25))
    assert rho is not None
    assert rho.value == pytest.approx((0.7 - 0.25) / (0.85 - 0.25))
    assert rho.low < rho.value < rho.high <= 1
    better = suite_retention(scored(shares(0.5), shares(0.9)))
    assert better is not None
    assert better.value == better.high == 1.0
    assert suite_retention(scored(shares(0.25), shares(0.2), chance=0.25)) is None


def test_of_a_cross_entropy_retention_is_the_ratio_of_perplexities() -> None:
    rho = suite_retention(scored([1.0, 2.0, 3.0], [1.1, 2.1, 3.1], suite=entropy()))
    assert rho is not None
    assert rho.value == pytest.approx(math.exp(-0.1))


def test_gain_and_least_retention_of_a_model() -> None:
    suites = (
        target(0.2, 0.6),
        scored(shares(0.8), shares(0.72), suite=exact("facts")),
        scored([1.0] * 4, [1.5] * 4, suite=entropy()),
    )
    found = measure(card(*suites))
    assert found.gain.value == pytest.approx(0.4)
    assert found.gain.low < 0.4 < found.gain.high
    assert found.retention.value == pytest.approx(math.exp(-0.5))
    assert found.retention_mean.value == pytest.approx((0.9 + math.exp(-0.5)) / 2)
    assert (found.contract, found.gain_unit) == ("broken", "share")
    assert [suite.name for suite in found.suites] == ["skill", "facts", "text"]
    assert found.suites[0].retention is None
    # BY_INTERVAL asks for 0.1 and allows 0.05: of the base's 0.8, and in nats.
    assert [suite.bound for suite in found.suites] == pytest.approx([0.1, 1 - 0.05 / 0.8, math.exp(-0.05)])


def test_target_suites_of_another_unit_do_not_count_into_the_gain() -> None:
    text = scored([2.0] * 3, [1.0] * 3, role="target", suite=entropy())
    kept = scored(shares(0.8), shares(0.8))
    assert measure(card(target(0.2, 0.6), text, kept)).gain.value == pytest.approx(0.4)
    first = measure(card(text, target(0.2, 0.6), kept))
    assert (first.gain.value, first.gain_unit) == (pytest.approx(1.0), "nats per byte")


def test_nothing_to_gain_or_to_keep_is_refused() -> None:
    with pytest.raises(TenureError, match="no target suite"):
        measure(card(scored(shares(0.8), shares(0.8))))
    with pytest.raises(TenureError, match="base above chance"):
        measure(card(target(0.1, 0.2), scored(shares(0.25), shares(0.25), chance=0.25)))


def test_errors_of_suites_add_up_as_squares_and_those_of_seeds_all_one_way() -> None:
    parts = [Measured(value=0.5, low=0.2, high=0.9), Measured(value=0.7, low=0.3, high=1.0)]
    apart, together = mean_of(parts, together=False), mean_of(parts, together=True)
    assert (apart.low, apart.high) == (pytest.approx(0.6 - 0.5 / 2), pytest.approx(0.6 + 0.5 / 2))
    assert (together.low, together.high) == (pytest.approx(0.6 - 0.7 / 2), pytest.approx(0.6 + 0.7 / 2))
    assert least_of(parts) == Measured(value=0.5, low=0.2, high=0.9)


def pooled(*tuned: float, contract: Contract = BY_INTERVAL, kept: float = 0.8) -> Measures:
    facts = exact("facts")
    cards = [
        card(target(0.2, score), scored(shares(0.8), shares(kept), contract, suite=facts), contract=contract)
        for score in tuned
    ]
    return pool(cards, contract)


def test_seeds_that_differ_widen_the_interval() -> None:
    alike, apart = pooled(0.6, 0.6, 0.6), pooled(0.4, 0.6, 0.8)
    assert alike.gain.value == apart.gain.value == pytest.approx(0.4)
    assert apart.gain.high - apart.gain.low > 1.5 * (alike.gain.high - alike.gain.low)


def test_a_kept_skill_without_a_changed_item_is_not_certain() -> None:
    """Of 100 items none changed over three seeds; the score interval goes z^2 / (n + z^2) down."""
    rho = pooled(0.6, 0.6, 0.6).retention
    assert (rho.value, rho.high) == (1.0, 1.0)
    assert rho.low == pytest.approx(1 - 3.8415 / 103.8415 / 0.8, abs=1e-4)


def test_pooled_seeds_are_judged_on_their_means() -> None:
    assert pooled(0.6, 0.7, kept=0.8).contract == "kept"
    broken = pooled(0.6, 0.7, kept=0.6)
    assert broken.contract == "broken"
    assert any("facts changed by -0.2000" in reason and "over 2 seeds" in reason for reason in broken.reasons)
    over_all = BY_INTERVAL.model_copy(update={"max_loss": 1.0, "min_retention": 0.9})
    assert pooled(0.6, 0.7, kept=0.6, contract=over_all).contract == "broken"
    assert pooled(0.6, 0.7, kept=0.8, contract=over_all).contract == "kept"


def test_one_seed_speaks_for_itself_and_protocols_must_agree() -> None:
    suites = (target(0.2, 0.6), scored(shares(0.8), shares(0.8)))
    assert pool([card(*suites)], BY_INTERVAL) == measure(card(*suites))
    with pytest.raises(TenureError, match="different protocols"):
        pool([card(*suites), card(*suites, protocol="other")], BY_INTERVAL)


def test_results_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Measured(value=1.0, low=2.0, high=3.0)
    with pytest.raises(ValueError, match="nothing says why"):
        Trial(name="a", strategy="s", config={}, seed=0, rung=0, state="failed", tokens=0, seconds=0, gpu_hours=0)
    with pytest.raises(ValueError, match="no range"):
        Dimension(path="training.learning_rate", kind="float")


def test_what_is_no_result_is_told_of(tmp_path: Path) -> None:
    assert read_result(tmp_path / "result.json") is None
    for text in ("{", '{"name": "x"}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(TenureError, match="no result of a sweep"):
            read_result(tmp_path / "result.json")


def test_a_result_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    trial = Trial(
        name="a", strategy="lora", config={"training.learning_rate": 1e-4}, seed=0, rung=1, state="finished",
        tokens=10, seconds=1.0, gpu_hours=0.0,
    )  # fmt: skip
    result = SweepResult(
        name="s-1", base="m", contract=Contract(), gain_unit="share", target_suites=("t",), retention_suites=("r",),
        dimensions=(Dimension(path="training.learning_rate", kind="float", low=1e-5, high=1e-3, log=True),),
        trials=(trial,), points=(), started="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="one name"):
        SweepResult.model_validate({**result.model_dump(), "trials": (trial, trial)})
