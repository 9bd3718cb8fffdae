"""The matrix of a sequence against its formulas by hand, and how it reads."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from rich.console import Console
from tiny_sequence import task, write_sequence

from cluster.cli import cli
from training.evaluation.scorecard import Scorecard, SuiteScore, Verdict
from training.sequences.plots import cell_text, shades
from training.sequences.report import figure_rows, print_sequence, render_sequence, write_sequence_report
from training.sequences.result import SequenceResult, make_result, read_result, write_result
from training.sequences.spec import SequenceSpec
from training.sequences.steps import load_sequence

NAMES = ("sums", "differences", "products")
# Rows: the base, then after each task; columns: the tasks, then a retention suite in nats.
SHARES = [[0.1, 0.2, 0.0, 1.5], [0.9, 0.3, 0.1, 1.6], [0.5, 0.8, 0.2, 1.8], [0.4, 0.6, 0.7, 2.0]]


def suite_score(name: str, share: bool, base: float, tuned: float) -> SuiteScore:
    return SuiteScore.model_construct(
        name=name,
        metric="exact_match" if share else "cross_entropy",
        unit="share" if share else "nats per byte",
        higher_is_better=share,
        base=base,
        tuned=tuned,
    )


def card(index: int, scores: list[list[float]], shares: tuple[bool, ...]) -> Scorecard:
    names = (*NAMES[: len(shares) - 1], "general")
    suites = tuple(
        suite_score(name, share, scores[index][place], scores[index + 1][place])
        for place, (name, share) in enumerate(zip(names, shares, strict=True))
    )
    return Scorecard.model_construct(
        run=f"run-{index}",
        protocol={},
        base_hash=f"hash-{index}",
        artifact_hash=f"hash-{index + 1}",
        suites=suites,
        contract=Verdict(verdict="kept" if index < 1 else "broken", min_gain=0, max_loss=0, reasons=()),
    )


@pytest.fixture
def sequence(tmp_path: Path) -> SequenceSpec:
    path = write_sequence(tmp_path, tmp_path, [task(name, "exact_match") for name in NAMES])
    return load_sequence(path)


@pytest.fixture
def result(sequence: SequenceSpec) -> SequenceResult:
    return make_result("tiny-1", sequence, [card(index, SHARES, (True, True, True, False)) for index in range(3)])


def test_the_figures_by_hand(result: SequenceResult) -> None:
    assert [list(row.scores) for row in result.rows] == SHARES
    figures = result.figures
    assert figures is not None
    assert figures.average_accuracy == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    assert figures.backward_transfer == pytest.approx(((0.4 - 0.9) + (0.6 - 0.8)) / 2)
    assert figures.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.2 - 0.0)) / 2)
    assert figures.forgetting == pytest.approx(((0.9 - 0.4) + (0.8 - 0.6)) / 2)
    assert result.forgotten == pytest.approx({"sums": 0.5, "differences": 0.2})


def test_a_sequence_half_done_has_the_figures_of_what_is_learned(sequence: SequenceSpec) -> None:
    cards = [card(index, SHARES, (True, True, True, False)) for index in range(2)]
    half = make_result("tiny-1", sequence, cards)
    assert half.figures is not None
    assert half.figures.num_tasks == half.num_learned == 2
    assert half.figures.backward_transfer == pytest.approx(0.5 - 0.9)
    assert make_result("tiny-1", sequence, cards[:1]).figures is not None


def test_without_scores_ahead_only_forward_transfer_is_missing(sequence: SequenceSpec) -> None:
    cards = [
        one.model_copy(update={"suites": tuple(s for s in one.suites if s.name in (*NAMES[: index + 1], "general"))})
        for index, one in enumerate(card(index, SHARES, (True, True, True, False)) for index in range(3))
    ]
    result = make_result("tiny-1", sequence, cards)
    assert result.score(1, 1) is None
    assert result.figures is not None
    assert result.figures.forward_transfer is None
    assert result.figures.forgetting == pytest.approx(0.35)
    assert "–" in render_sequence(result)


def test_units_that_differ_have_no_common_figure(sequence: SequenceSpec) -> None:
    cards = [card(index, SHARES, (True, False, True, False)) for index in range(3)]
    result = make_result("tiny-1", sequence, cards)
    assert result.figures is None
    assert result.forgotten["differences"] == pytest.approx(0.6 - 0.3)  # of nats: the best is the least
    assert "different units" in render_sequence(result)
    assert "different units" in printed(result)


def test_the_result_survives_its_file(result: SequenceResult, tmp_path: Path) -> None:
    assert read_result(tmp_path / "result.json") is None
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


def test_darker_is_better_whatever_the_metric(result: SequenceResult) -> None:
    assert shades(result, 0) == [0.1, 0.9, 0.5, 0.4]
    assert shades(result, 3) == pytest.approx([1.0, 0.8, 0.4, 0.0])
    assert cell_text(result.columns[0], 0.125) == "12.5 %"
    assert cell_text(result.columns[3], 1.5) == "1.500"


def printed(result: SequenceResult) -> str:
    out = io.StringIO()
    print_sequence(Console(file=out, width=100), result)
    return out.getvalue()


def test_the_screen_shows_matrix_and_figures(result: SequenceResult) -> None:
    text = printed(result)
    assert re.search(r"1\. sums +\[90\.0 %\] +30\.0 % +10\.0 % +1\.600 +kept", text)
    assert re.search(r"backward transfer +−35\.0 pts", text)
    assert re.search(r"forgetting +\+35\.0 pts", text)
    assert "forgotten by task: sums +50.0 pts, differences +20.0 pts" in text


def test_the_page_needs_nothing_else_and_holds_every_number(result: SequenceResult, tmp_path: Path) -> None:
    write_sequence_report(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "<script" not in page
    for row in range(4):
        for column in range(4):
            assert f">{cell_text(result.columns[column], result.score(row, column))}<" in page
    assert all(value in page for _, value, _ in figure_rows(result))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_names_of_tasks_are_text_on_the_page(sequence: SequenceSpec) -> None:
    cards = [card(index, SHARES, (True, True, True, False)) for index in range(3)]
    result = make_result("tiny-1", sequence, cards)
    wild = result.model_copy(update={"tasks": ("<b>x</b>", *result.tasks[1:])})
    assert "<b>x</b>" not in render_sequence(wild)


def test_the_json_of_a_sequence_keeps_its_published_schema(result: SequenceResult) -> None:
    printed = CliRunner().invoke(cli, ["schema", "sequence-result"])
    jsonschema.validate(json.loads(result.model_dump_json()), json.loads(printed.stdout))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"sequence": "x"}, json.loads(printed.stdout))
