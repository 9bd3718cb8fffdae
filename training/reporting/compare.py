"""Runs side by side as one HTML file that needs nothing else: each against the first, item by item."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from training.evaluation.comparison import ChangedItem, Comparison, SuiteDifference
from training.evaluation.pooling import PooledSeeds
from training.evaluation.scorecard import Scorecard, SuiteScore
from training.reporting import formatting as text
from training.reporting.curves import Metrics, cost_rows, read_metrics
from training.reporting.html import MAX_ITEMS_PER_SUITE, Chart, environment, gpus_of, lineage_rows
from training.reporting.plots import COLOURS, Line, draw_changes, draw_curves
from training.workspace import RunFolder, write_text


@dataclass(frozen=True)
class Changed:
    """The items of a suite that one run lost or won against the first, and how many of them the page holds."""

    suite: SuiteDifference
    better: str
    interval: str
    groups: list[tuple[str, str, tuple[ChangedItem, ...]]]
    summary: str


@dataclass(frozen=True)
class Column:
    """One run: its verdict, suites by name, what it forgot, was trained on, cost, and where it came from."""

    card: Scorecard
    suites: dict[str, SuiteScore]
    forgetting: tuple[str, ...]
    data: str
    cost: dict[str, str]
    lineage: dict[str, str]


def write_comparison(
    path: Path,
    runs: Sequence[RunFolder],
    cards: Sequence[Scorecard],
    comparison: Comparison,
    pooled: PooledSeeds | None,
) -> Path:
    """Write the page, whole or not at all; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_comparison(runs, cards, comparison, pooled))
    return path


def render_comparison(
    runs: Sequence[RunFolder], cards: Sequence[Scorecard], comparison: Comparison, pooled: PooledSeeds | None = None
) -> str:
    """The page as HTML; curves, cost and lineage are read from the runs' folders, where they are there."""
    metrics = [read_metrics(run.metrics) for run in runs]
    columns = [_column(*one) for one in zip(runs, cards, metrics, strict=True)]
    names = dict.fromkeys(suite.name for card in cards for suite in card.suites)
    page = environment().get_template("compare.html.j2")
    return page.render(
        columns=columns,
        names=list(names),
        change_svg=_changes(names, columns),
        pairs=[(pair, [_changed(suite) for suite in pair.suites]) for pair in comparison.pairs],
        same_base=all(pair.same_base for pair in comparison.pairs),
        pooled=pooled,
        charts=[
            _chart(runs, metrics, "loss", "Training loss"),
            _chart(runs, metrics, "learning_rate", "Learning rate"),
            *_validation(runs, metrics),
        ],
        cost_names=_names(column.cost for column in columns),
        lineage_names=_names(column.lineage for column in columns),
        protocol_hash=comparison.protocol_hash,
        colours=COLOURS,
        most_items=MAX_ITEMS_PER_SUITE,
    )


def _changes(names: Iterable[str], columns: Sequence[Column]) -> Markup | None:
    """Every run's change on every suite, the runs of one suite below one another; nothing without suites."""
    rows = [
        column.suites[name].model_copy(update={"name": f"{name}: {column.card.run}"})
        for name in names
        for column in columns
        if name in column.suites
    ]
    return Markup(draw_changes(rows)) if rows else None


def _names(tables: Iterable[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _column(run: RunFolder, card: Scorecard, metrics: Metrics | None) -> Column:
    return Column(
        card=card,
        suites={suite.name: suite for suite in card.suites},
        forgetting=text.forgetting_lines(card),
        data=text.data_line(card),
        cost=dict(cost_rows(metrics, card.seconds, gpus_of(run))),
        lineage={"base model": card.base_model, "base hash": card.base_hash[:16], **dict(lineage_rows(run.lineage))},
    )


def _changed(suite: SuiteDifference) -> Changed:
    words = ("lost", "won") if suite.unit == "share" else ("worse", "better")
    groups = [
        (word.capitalize(), fate, items)
        for word, fate, items in zip(words, ("lost", "won"), (suite.lost, suite.won), strict=True)
        if items
    ]
    summary = f"{len(suite.lost):,} {words[0]}, {len(suite.won):,} {words[1]}"
    better, low, high = (text.amount_text(suite.unit, value) for value in (suite.difference, *suite.interval))
    return Changed(suite, better, f"[{low}, {high}]", groups, summary)


def _chart(runs: Sequence[RunFolder], metrics: Sequence[Metrics | None], field: str, title: str) -> Chart | None:
    lines = [Line(run.id, found.curve(field)) for run, found in zip(runs, metrics, strict=True) if found]
    return _drawn(field, lines, title, "nats per target token" if field == "loss" else "")


def _validation(runs: Sequence[RunFolder], metrics: Sequence[Metrics | None]) -> list[Chart | None]:
    """A chart for every suite that was validated on."""
    suites = dict.fromkeys(name for found in metrics if found for name in found.validation)
    charts = []
    for index, suite in enumerate(suites):
        lines = [
            Line(run.id, found.validation.get(suite, ())) for run, found in zip(runs, metrics, strict=True) if found
        ]
        charts.append(_drawn(f"validation-{index}", lines, f"Validation loss: {suite}", "nats per target token"))
    return charts


def _drawn(name: str, lines: Sequence[Line], title: str, note: str) -> Chart | None:
    drawn = [line for line in lines if line.points]
    return Chart(title, Markup(draw_curves(name, drawn, title)), note) if drawn else None
