"""Reports of a run: the scorecard in the terminal, two runs side by side, and the HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from training.errors import TenureError
from training.evaluation.comparison import ChangedItem, Pair, SuiteDifference, protocol_problem
from training.evaluation.pooling import PooledSeeds
from training.evaluation.scorecard import Scorecard, SuiteScore, read_scorecard
from training.reporting import formatting as text
from training.reporting.formatting import Example
from training.reporting.html import render_html
from training.reporting.wise import WiseCurve
from training.workspace import RunFolder

__all__ = ["print_comparison", "print_pair", "print_scorecard", "print_wise", "render_html", "write_report"]

_MAX_ANSWER_CHARACTERS = 300


def print_scorecard(console: Console, scorecard: Scorecard) -> None:
    """Print the verdict, every suite's scores, and up to three answers before and after."""
    _print_verdict(console, scorecard)
    console.print(Padding(_suite_table(scorecard), (1, 0)))
    for line in filter(
        None, (*text.part_lines(scorecard), *text.forgetting_lines(scorecard), text.data_line(scorecard))
    ):
        console.print(_plain(line))
    console.print(Text(_legend(scorecard), "dim"))
    for example in text.pick_examples(scorecard):
        _print_example(console, example)


def print_comparison(console: Console, a: Scorecard, b: Scorecard) -> None:
    """Print two runs side by side, suite by suite.

    Raises:
        TenureError: they were scored under different protocols, and so do not compare; names what differs.
    """
    if a.protocol_hash != b.protocol_hash:
        raise TenureError(protocol_problem(a, b))
    for label, scorecard in (("a: ", a), ("b: ", b)):
        _print_verdict(console, scorecard, label)
    console.print(Padding(_comparison_table(a, b), (1, 0)))
    console.print(Text("Each change is against the run's own base. pts: percentage points.", "dim"))
    if a.base_hash != b.base_hash:
        console.print(_plain(f"The bases differ: a tuned {a.base_model}, b tuned {b.base_model}.", "bold"))


def print_pair(console: Console, pair: Pair) -> None:
    """Print how much better the second run is, item by item, and a few of the items that it lost and won."""
    table = _table("suite", f"{pair.second}\nbetter by", "[95 %]", "lost>", "won>", "p>")
    for suite in pair.suites:
        scale = 100 if suite.unit == "share" else 1
        ends = ", ".join(f"{scale * end:+.4g}" for end in suite.interval)
        better = f"{scale * suite.difference:+.4g}{' pts' if scale == 100 else ''}"
        table.add_row(
            _plain(suite.name), better, f"[{ends}]", str(len(suite.lost)), str(len(suite.won)), f"{suite.p_holm:.3g}"
        )
    console.print(Padding(table, (1, 0)))
    for role, (ours, theirs) in pair.kl_to_base.items():
        told = (
            f"KL to the base on {role} prompts: {ours:.4f} ({pair.first}), {theirs:.4f} ({pair.second}) nats per token"
        )
        console.print(_plain(told))
    note = "Paired over items; p by McNemar or sign flips, corrected over the suites (Holm). --json lists all items."
    console.print(Text(note, "dim"))
    for suite in pair.suites:
        if suite.unit == "share":
            _print_changed(console, pair, suite)


def print_pooled(console: Console, pooled: PooledSeeds) -> None:
    """Print every suite's mean change over seeds, its spread and its interval."""
    table = _table("suite\nrole", "mean change>", "[95 %]>", "deviation>\nover seeds", "each seed>")
    for suite in pooled.suites:
        low, high, *changes = (text.amount_text(suite.unit, v) for v in (*suite.interval, *suite.changes))
        mean, spread = (text.amount_text(suite.unit, value) for value in (suite.change, suite.deviation))
        table.add_row(
            _stacked(suite.name, suite.role), mean, f"[{low}, {high}]", spread.lstrip("+"), ", ".join(changes)
        )
    console.print(_plain(f"{', '.join(pooled.runs)}: seeds {', '.join(map(str, pooled.seeds))}", "bold"))
    console.print(Padding(table, (1, 0)))
    console.print(Text("Against the base; a positive change is better. The interval is over seeds and items.", "dim"))


def _print_changed(console: Console, pair: Pair, suite: SuiteDifference) -> None:
    for word, items in (("lost", suite.lost), ("won", suite.won)):
        for item in items[:1]:
            console.print(_plain(f"{suite.name}, item {item.index}, {word} by {pair.second}", "bold"))
            console.print(Padding(_both_answers(pair, item), (0, 0, 0, 2)))


def _both_answers(pair: Pair, item: ChangedItem) -> Table:
    grid = Table.grid(padding=(0, 2))
    rows = (("prompt", item.prompt), ("expected", item.expected))
    for label, body in (*rows, (pair.first, item.first_answer), (pair.second, item.second_answer)):
        grid.add_row(Text(label, "dim"), _plain(text.clip(body, _MAX_ANSWER_CHARACTERS)))
    return grid


def print_wise(console: Console, curve: WiseCurve) -> None:
    """Print what every alpha between base (0) and tuned (1) gains and forgets."""
    console.print(_plain(f"base and tuned of run {curve.run}, interpolated", "bold"))
    table = _table("alpha>", *(f"{suite.name}>\n{suite.role}" for suite in curve.points[0].suites), "contract")
    for point in curve.points:
        style = "cyan" if point.contract.verdict == "kept" else "bold yellow"
        cells = [_stacked(text.change_text(suite, suite.change), text.interval_text(suite)) for suite in point.suites]
        table.add_row(f"{point.alpha:g}", *cells, _plain(text.kept_text(point.contract.verdict), style))
    console.print(Padding(table, (1, 0)))
    console.print(Text("Changes against the base; a positive one is better. pts: percentage points.", "dim"))
    for line in text.wise_lines(curve):
        console.print(line)


def write_report(run: RunFolder) -> Path:
    """Write a run's report.html from what lies in its folder, and return its path.

    Raises:
        TenureError: the run was never scored, or plan.json or lineage.json is damaged.
    """
    html = render_html(run, read_scorecard(run.scorecard))
    part = run.report.with_name(f".{run.report.name}.{os.getpid()}.part")
    part.write_text(html, encoding="utf-8")
    part.replace(run.report)
    return run.report


def _print_verdict(console: Console, scorecard: Scorecard, label: str = "") -> None:
    verdict = scorecard.contract.verdict
    sign, style = text.SIGNS[verdict], "bold cyan" if verdict == "kept" else "bold yellow"
    console.print(_plain(f"{label}{sign} {text.verdict_text(scorecard)}: run {scorecard.run}", style))
    for reason in text.reasons_of(scorecard):
        console.print(Padding(_plain(reason), (0, 0, 0, 2)))


def _legend(scorecard: Scorecard) -> str:
    lower = dict.fromkeys(text.metric_text(suite) for suite in scorecard.suites if not suite.higher_is_better)
    notes = ["A positive change is better.", *(f"Of {name}, lower is better." for name in lower)]
    return " ".join([*notes, "pts: percentage points."])


def _suite_table(scorecard: Scorecard) -> Table:
    table = _table("suite\nrole", "metric", "n>", "base>", "tuned>", "change>\n[95 %]", "threshold\nkept")
    for suite in scorecard.suites:
        table.add_row(
            _stacked(suite.name, suite.role),
            _stacked(text.metric_text(suite), "" if text.is_share(suite) else suite.unit),
            str(len(suite.items)),
            text.score_text(suite, suite.base),
            text.score_text(suite, suite.tuned),
            _change_cell(suite),
            _stacked(
                text.threshold_text(suite), text.kept_text(suite.verdict), "cyan" if suite.kept else "bold yellow"
            ),
        )
    return table


def _comparison_table(a: Scorecard, b: Scorecard) -> Table:
    table = _table("suite\nmetric", "tuned>\na", "tuned>\nb", "change a>\n[95 %]", "change b>\n[95 %]", "b better>\nby")
    suites_a, suites_b = ({suite.name: suite for suite in scorecard.suites} for scorecard in (a, b))
    for name in dict.fromkeys([*suites_a, *suites_b]):
        pair = (suites_a.get(name), suites_b.get(name))
        either = next(suite for suite in pair if suite)
        table.add_row(
            _stacked(name, text.metric_text(either)),
            *(text.score_text(suite, suite.tuned) if suite else "–" for suite in pair),
            *(_change_cell(suite) if suite else Text("–") for suite in pair),
            _difference(*pair),
        )
    return table


def _difference(a: SuiteScore | None, b: SuiteScore | None) -> str:
    """How much better b's tuned score is than a's."""
    if a is None or b is None:
        return "–"
    difference = b.tuned - a.tuned
    return text.change_text(b, difference if b.higher_is_better else -difference)


def _table(*headings: str) -> Table:
    """An empty table; a heading with '>' stands over figures, set right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading.replace(">", ""), justify="right" if ">" in heading else "left", overflow="fold")
    return table


def _change_cell(suite: SuiteScore) -> Text:
    return _stacked(text.change_text(suite, suite.change), text.interval_text(suite))


def _promise_cell(suite: SuiteScore) -> Text:
    style = "cyan" if suite.kept else "bold yellow"
    return _stacked(text.threshold_text(suite), text.kept_text(suite.verdict), style)


def _stacked(first: str, second: str, style: str = "dim") -> Text:
    # Two lines to a row, so that the table fits a terminal of 80 columns.
    return Text.assemble(_plain(first), "\n", _plain(second, style))


def _print_example(console: Console, example: Example) -> None:
    suite, item = example.suite, example.item
    rows = (
        ("prompt", "", item.prompt),
        ("expected", "", item.expected),
        ("before", text.item_score_text(suite, item.base_score), item.base_answer),
        ("after", text.item_score_text(suite, item.tuned_score), item.tuned_answer),
    )
    grid = Table.grid(padding=(0, 2))
    for label, score, body in rows:
        grid.add_row(Text(label, "dim"), Text(score, "bold"), _plain(text.clip(body, _MAX_ANSWER_CHARACTERS)))
    console.print()
    console.print(_plain(f"{suite.name}, item {item.index}", "bold"))
    console.print(Padding(grid, (0, 0, 0, 2)))


def _plain(body: str, style: str = "") -> Text:
    """Text of users and models, shown as it is: no markup, and nothing that steers the terminal."""
    return Text(text.printable(body), style)
