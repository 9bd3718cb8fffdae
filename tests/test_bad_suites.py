"""Suites and scorecards that say little or nothing: told plainly, never averaged away."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from one_command import run_tenure
from rich.console import Console
from test_contract import answers, scored
from test_sequence_report import SHARES, card, sequence
from tiny_spec import write_rows, write_tiny_spec

from training.data.items import Answered
from training.errors import TenureError
from training.evaluation.comparison import compare_runs
from training.evaluation.metrics import worth_of
from training.evaluation.power import powers, warnings
from training.evaluation.scorecard import Scorecard, read_scorecard
from training.evaluation.scoring import ask_suites
from training.reporting.formatting import reasons_of
from training.sequences.report import print_sequence, render_sequence
from training.sequences.result import SequenceResult, make_result
from training.sequences.spec import SequenceSpec
from training.spec import Contract
from training.specfile import load_spec
from training.suite_spec import Agreement, Chrf, Classification, ExactMatch, Regex, TokenF1

__all__ = ["sequence"]  # a fixture


def cards(**changed: Any) -> list[Scorecard]:
    """Three runs' scorecards; what is given replaces settings of the second one's protocol."""
    settings = {"harness": "0.4.12", "suite.a": '{"max_new_tokens": 8}'}
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    protocols = [settings, settings | changed, settings]
    return [
        card(index, SHARES, (True, True, True, False)).model_copy(
            update={"protocol": protocol, "protocol_hash": json.dumps(protocol)}
        )
        for index, protocol in enumerate(protocols)
    ]


def test_scorecards_of_another_harness_are_not_compared() -> None:
    with pytest.raises(TenureError, match=r"harness is '0\.4\.12' in run-0 and '0\.4\.13' in run-1"):
        compare_runs(cards(harness="0.4.13"))


def test_suites_of_other_settings_or_items_are_not_compared() -> None:
    with pytest.raises(TenureError, match=r"suite\.a is .*8.* in run-0 and .*64.* in run-1.*\n.*one protocol"):
        compare_runs(cards(suite__a='{"max_new_tokens": 64}'))
    with pytest.raises(TenureError, match=r"data\.a is not set in run-0 and 'f00' in run-1"):
        compare_runs(cards(data__a="f00"))


def shown(result: SequenceResult) -> str:
    console = Console(record=True, width=160)
    print_sequence(console, result)
    return console.export_text()


def test_a_matrix_of_unlike_protocols_has_no_figures_and_says_why(sequence: SequenceSpec) -> None:
    alike, unlike = (make_result("s-1", sequence, cards(**more)) for more in ({}, {"harness": "0.4.13"}))
    assert alike.figures is not None
    assert alike.unlike == ()
    assert (unlike.figures, unlike.forgotten) == (None, {})
    assert [row.scores for row in unlike.rows] == [row.scores for row in alike.rows]
    for told in (shown(unlike), render_sequence(unlike).replace("&#39;", "'")):
        assert "scored under different protocols, so there are no figures over them" in told
        assert "harness is '0.4.12' in run-0, '0.4.13' in run-1" in told
        assert "different units" not in told


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"schema_version": 3}', "schema_version: Input should be 1 or 2"),
        ('{"schema_version": 2, "run": "r', "Invalid JSON"),
        ("", "Invalid JSON"),
    ],
)
def test_a_scorecard_that_cannot_be_read_is_one_error(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "scorecard.json").write_text(content)
    with pytest.raises(TenureError) as caught:
        read_scorecard(tmp_path / "scorecard.json")
    assert what in str(caught.value)
    assert "score the run again" in str(caught.value)


def test_the_command_refuses_a_damaged_scorecard(tmp_path: Path) -> None:
    run = tmp_path / "workspace" / "runs" / "mine-1"
    run.mkdir(parents=True)
    (run / "scorecard.json").write_text("{}")
    done = run_tenure(tmp_path, "report", "mine-1")
    assert done.returncode == 2, done.stderr
    assert "this is no scorecard that this Tenure reads" in done.stderr
    assert "Traceback" not in done.stderr


def test_three_items_are_called_too_few_before_and_after(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path, Path("some/model")))
    three, many = answers([1.0, 0.0, 1.0]), answers([1.0, 0.0] * 20)
    told = list(warnings(powers(spec, {"sums": three, "sentences": many})))
    assert "sums: 3 items are too few to tell a change from chance" in told
    assert not any(line.startswith("sentences: 40 items are too few to tell a change") for line in told)
    suite = scored([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], Contract(judge_by="interval"))
    assert suite.state == "undecided"
    assert "3 items are too few to tell a change from chance" in suite.notes[0]


def test_a_base_that_answers_nothing_or_nothing_readable_is_told_of_before_training(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path, Path("some/model")))
    silent = [Answered("q", "a", " \n" if n < 30 else "a", 0.0, 1.0, readable=n >= 12) for n in range(40)]
    told = list(warnings(powers(spec, {"sums": silent, "sentences": answers([1.0, 1.1] * 20)})))
    assert "sums: the base answers nothing to 30 of 40 items" in told
    assert "sums: the metric can read nothing in 12 of 40 of its answers" in told


def test_notes_stand_beside_the_verdict(tmp_path: Path) -> None:
    suite = scored([1.0] * 12, [1.0] * 12)
    noted = suite.model_copy(update={"notes": ("the tuned model answered nothing to 3 of 12 items",)})
    first = cards()[0]
    assert f"{suite.name}: the tuned model answered nothing to 3 of 12 items." in reasons_of(
        first.model_copy(update={"suites": (noted,)})
    )


ASKED: dict[str, Any] = {"name": "s", "path": Path("f"), "prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    "suite",
    [
        Regex(metric="regex", pattern=".*", **{**ASKED, "completion": None}),
        TokenF1(metric="token_f1", **ASKED),
        Chrf(metric="chrf", **ASKED),
        Classification(metric="classification", labels=("the", "a"), **ASKED),
        Agreement(metric="agreement", **{**ASKED, "completion": None}),
        ExactMatch(metric="exact_match", **ASKED),
    ],
    ids=lambda suite: suite.metric,
)
@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_worth_nothing(suite: Any, answer: str) -> None:
    assert worth_of(suite, answer, "The").score == 0.0


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_stops_the_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    spec = load_spec(write_tiny_spec(tmp_path, Path("some/model")))
    found = [Answered("q", "a", "a", 0.1, 1.0), Answered("q", "a", "a", score, 1.0)]
    monkeypatch.setattr("training.evaluation.scoring._score_suite", lambda *_: found)
    with pytest.raises(TenureError, match=r"sums: the model gives item 1 a score that is no finite number .*\n.*rate"):
        ask_suites(spec, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suite", "what"),
    [
        ({"metric": "exactmatch"}, "exact_match"),
        ({"metric": "regex", "pattern": "("}, "is no regular expression"),
        ({"metric": "classification"}, "labels"),
        ({"metric": "exact_match", "completion": "nowhere"}, "nowhere"),
    ],
)
def test_a_metric_without_what_it_reads_answers_by_is_refused(
    tmp_path: Path, tiny_model: Path, suite: dict[str, Any], what: str
) -> None:
    target = {"name": "sums", "path": "sums.jsonl", "prompt": "question", "completion": "answer"} | suite
    write_tiny_spec(tmp_path, tiny_model, suites={"target": [target]})
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert done.returncode == 2, done.stdout
    assert what in done.stderr
    assert "Traceback" not in done.stderr


def test_a_suite_without_items_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    write_tiny_spec(tmp_path, tiny_model)
    write_rows(tmp_path / "sums.jsonl", [])
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert done.returncode == 2
    assert "sums.jsonl is empty" in done.stderr
