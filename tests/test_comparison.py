"""Runs against each other, item by item."""

from __future__ import annotations

import json

import pytest
from jsonschema import validate
from rich.console import Console

from training.errors import TenureError
from training.evaluation.comparison import Comparison, compare_runs
from training.evaluation.scorecard import Item, Scorecard, SuiteScore, Verdict
from training.reporting.report import print_pair


def suite(scores: list[float], name: str = "skill", higher: bool = True) -> SuiteScore:
    items = tuple(
        Item(
            index=n, prompt=f"q{n}", expected="x", base_answer="b", tuned_answer=f"said {score}", base_score=0.0,
            tuned_score=score,
        )
        for n, score in enumerate(scores)
    )  # fmt: skip
    mean = sum(scores) / len(scores)
    return SuiteScore(
        name=name, role="target", metric="exact_match" if higher else "cross_entropy", higher_is_better=higher,
        unit="share" if higher else "nats per byte", base=0.0, tuned=mean, change=mean, interval=(0.0, 1.0),
        threshold=0.0, kept=True, items=items,
    )  # fmt: skip


def card(run: str, *suites: SuiteScore, protocol: str = "p") -> Scorecard:
    return Scorecard(
        run=run, protocol={"few_shot": 0}, protocol_hash=protocol, base_model="b", base_hash="b", artifact_hash=run,
        suites=suites, contract=Verdict(verdict="kept", min_gain=0, max_loss=0, reasons=()),
        probes={}, versions={}, seconds=1.0,
    )  # fmt: skip


def test_the_second_run_is_judged_item_by_item() -> None:
    first, second = card("a-1", suite([1, 1, 1, 0, 0, 0] * 10)), card("b-1", suite([1, 1, 0, 1, 1, 1] * 10))
    (pair,) = compare_runs([first, second]).pairs
    (found,) = pair.suites
    assert found.difference == pytest.approx(20 / 60)
    assert (len(found.lost), len(found.won)) == (10, 30)
    assert found.lost[0].index == 2
    assert (found.lost[0].first_answer, found.lost[0].second_answer) == ("said 1", "said 0")
    assert found.p_value < 0.01
    assert found.interval[0] < 20 / 60 < found.interval[1]


def test_a_run_against_itself_differs_in_nothing() -> None:
    (pair,) = compare_runs([card("a-1", suite([1, 0, 1])), card("a-1", suite([1, 0, 1]))]).pairs
    assert (pair.suites[0].difference, pair.suites[0].p_holm, pair.suites[0].lost) == (0.0, 1.0, ())


def test_lower_is_better_where_it_is() -> None:
    first, second = (card(run, suite([value] * 5, "text", higher=False)) for run, value in (("a-1", 2.0), ("b-1", 1.5)))
    assert compare_runs([first, second]).pairs[0].suites[0].difference == pytest.approx(0.5)


def test_p_values_are_corrected_and_missing_suites_named() -> None:
    first = card("a-1", suite([1] * 8), suite([1] * 8, "other"))
    second = card("b-1", suite([0] * 8), suite([1] * 8, "other"), suite([1] * 8, "third"))
    (pair,) = compare_runs([first, second]).pairs
    assert pair.suites[0].p_holm == pytest.approx(2 * pair.suites[0].p_value)
    assert pair.missing == ("third",)


def test_many_runs_are_all_compared_with_the_first() -> None:
    cards = [card(f"r-{n}", suite([1, 0, n % 2])) for n in range(3)]
    comparison = compare_runs(cards)
    assert [(pair.first, pair.second) for pair in comparison.pairs] == [("r-0", "r-1"), ("r-0", "r-2")]
    written = json.loads(comparison.model_dump_json())
    validate(written, Comparison.model_json_schema())
    assert Comparison.model_validate(written) == comparison


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(TenureError, match="different protocols"):
        compare_runs([card("a-1", suite([1])), card("b-1", suite([1]), protocol="q")])
    with pytest.raises(TenureError, match="one run alone"):
        compare_runs([card("a-1", suite([1]))])


def test_the_screen_shows_what_was_lost_and_won() -> None:
    console = Console(width=100, record=True, file=None, quiet=False)
    first, second = card("a-1", suite([1, 1, 0, 0])), card("b-1", suite([1, 0, 1, 1]))
    with console.capture() as captured:
        print_pair(console, compare_runs([first, second]).pairs[0])
    out = captured.get()
    assert "+25 pts" in out
    assert "item 1, lost by b-1" in out
    assert "item 2, won by b-1" in out
