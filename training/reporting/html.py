"""The HTML report of a run: one file that needs nothing else, for people who were not there."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from training.errors import fail
from training.evaluation.scorecard import Item, Scorecard, SuiteScore
from training.reporting import formatting as text
from training.reporting.curves import Gpus, Metrics, Points, cost_rows, read_metrics, task_totals
from training.reporting.marks import marked
from training.reporting.plots import COLOURS, Line, draw_changes, draw_curves, points_per_mean
from training.reporting.tasks import task_rows
from training.reporting.wise import WiseCurve, read_curve
from training.workspace import RunFolder, read_json

MAX_ITEMS_PER_SUITE = 200
# A nested object with more leaves than this (package versions, say) is folded away.
_MAX_OPEN_ROWS = 12

FATES = {-1: "lost", 1: "won", 0: "unchanged"}

KeyValues = list[tuple[str, str]]


@dataclass(frozen=True)
class Group:
    """Items of one fate: lost, won or unchanged."""

    title: str
    fate: str
    items: list[Item]


@dataclass(frozen=True)
class Answers:
    """The items of one suite that the page holds, lost ones first, and how many there are in all."""

    suite: SuiteScore
    summary: str
    groups: list[Group]
    num_shown: int


@dataclass(frozen=True)
class Chart:
    """One figure; `note` says what was thinned or left out."""

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Table:
    """Keys and values under a title."""

    title: str
    rows: KeyValues
    folded: bool = False


def render_html(run: RunFolder, scorecard: Scorecard) -> str:
    """The report as one HTML document, from the scorecard and what lies in the run's folder.

    metrics.jsonl, wise.json, plan.json and lineage.json may be missing: then their sections are left out.

    Raises:
        TenureError: plan.json or lineage.json does not hold a JSON object.
    """
    metrics = read_metrics(run.metrics)
    wise = read_curve(run.wise_curve)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run_id=run.id,
            scorecard=scorecard,
            reasons=text.reasons_of(scorecard),
            change_svg=Markup(draw_changes(scorecard.suites)) if scorecard.suites else None,
            examples=text.pick_examples(scorecard),
            answers=[_answers(suite) for suite in scorecard.suites if suite.items],
            charts=_charts(metrics) if metrics else [],
            tasks=task_rows(task_totals(metrics), metrics.validation, _read_object(run.plan)) if metrics else [],
            wise_charts=_wise_charts(wise) if wise else [],
            wise_lines=text.wise_lines(wise) if wise else (),
            num_unreadable_lines=metrics.num_unreadable_lines if metrics else 0,
            cost=cost_rows(metrics, scorecard.seconds, gpus_of(run)),
            details=[*_measurement(scorecard), *_plan(run.plan), *_lineage(run.lineage)],
            colours=COLOURS,
            max_text_characters=text.MAX_TEXT_CHARACTERS,
        )
    )


def gpus_of(run: RunFolder) -> Gpus:
    """How many GPUs a run had, and what one costs an hour, by its spec."""
    scaling = _read_object(run.spec).get("scaling", {})
    count = int(scaling.get("workers", 1)) * int(scaling.get("gpus_per_worker", 0))
    return Gpus(count, scaling.get("price_per_gpu_hour"))


def environment() -> Environment:
    """The templates of reports, which escape all that is filled in."""
    # Items hold whatever users and models wrote: everything is escaped but the charts.
    folder = Path(__file__).parent / "templates"
    loader = FileSystemLoader(folder)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clip"] = text.clip
    environment.globals["text"] = text
    environment.globals["marked"] = marked
    # The one script that a page may run, named by its hash: whatever an answer holds, it runs nothing.
    script = (folder / "filter.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return environment


def _answers(suite: SuiteScore) -> Answers:
    shown = text.most_changed(suite)[:MAX_ITEMS_PER_SUITE]
    words = ("lost", "won", "unchanged") if text.is_share(suite) else ("worse", "better", "unchanged")
    counts = [len(_of_fate(suite, suite.items, fate)) for fate in (-1, 1, 0)]
    summary = ", ".join(f"{count:,} {word}" for count, word in zip(counts, words, strict=True))
    groups = [
        Group(word.capitalize(), FATES[fate], _of_fate(suite, shown, fate))
        for fate, word in zip((-1, 1, 0), words, strict=True)
    ]
    return Answers(suite, summary, [group for group in groups if group.items], len(shown))


def _of_fate(suite: SuiteScore, items: Iterable[Item], fate: int) -> list[Item]:
    """The items that got worse (-1), better (1) or neither (0)."""
    changes = ((item, text.improvement(suite, item)) for item in items)
    return [item for item, change in changes if (change > 0) - (change < 0) == fate]


def _charts(metrics: Metrics) -> list[Chart]:
    validation = [Line(name, points) for name, points in metrics.validation.items()]
    learned = "pair" if "margin" in metrics.parts else "target token"
    charts = (
        _step_chart(metrics, "loss", "Training loss", f"nats per {learned}"),
        *(_part_chart(name, points) for name, points in metrics.parts.items()),
        _chart("tasks", "Training loss by task", _task_lines(metrics), f"nats per {learned}, without weights"),
        _chart("validation", "Validation loss", validation, "nats per target token"),
        _step_chart(metrics, "learning_rate", "Learning rate", ""),
        _step_chart(metrics, "grad_norm", "Gradient norm", "before clipping"),
    )
    return [chart for chart in charts if chart]


def _task_lines(metrics: Metrics) -> list[Line]:
    return [Line(task.name, task.losses) for task in task_totals(metrics)]


_PARTS = {
    "cross_entropy": ("Cross-entropy in training", "nats per target token"),
    "divergence": ("Divergence from the teacher", "nats per target token, without its factors"),
    "kl": ("KL from the base", "nats per target token, without its factors"),
    "accuracy": ("Preference accuracy", "share of the step's pairs whose chosen answer has the higher log-ratio"),
    "margin": ("Preference margin", "beta times the difference of the answers' log-ratios, a mean over pairs"),
}


def _part_chart(name: str, points: Points) -> Chart | None:
    title, unit = _PARTS[name]
    return _chart(name, title, [Line(title, points)], unit)


def _wise_charts(curve: WiseCurve) -> list[Chart]:
    """Every suite's change over alpha, one chart per unit."""
    charts = []
    for share, unit in ((True, "percentage points"), (False, "nats")):
        lines = [
            Line(name, [(alpha, suite.change * (100 if share else 1)) for alpha, suite in suites])
            for name, suites in curve.by_suite().items()
            if text.is_share(suites[0][1]) is share
        ]
        if lines:
            title = f"Change in {unit}"
            svg = draw_curves(f"wise-{int(share)}", lines, title, "alpha: 0 is the base, 1 the tuned model")
            charts.append(Chart(title, Markup(svg), "positive is better"))
    return charts


def _step_chart(metrics: Metrics, field: str, title: str, unit: str) -> Chart | None:
    points = metrics.curve(field)
    missing = len(metrics.steps) - len(points)
    notes = [f"{missing:,} of {len(metrics.steps):,} steps had no finite value"] if missing else []
    return _chart(field, title, [Line(title, points)], unit, notes)


def _chart(name: str, title: str, lines: list[Line], unit: str, notes: Iterable[str] = ()) -> Chart | None:
    drawn = [line for line in lines if line.points]
    if not drawn:
        return None
    each = max(points_per_mean(line.points) for line in drawn)
    thinned = [f"each point is the mean of up to {each:,}"] if each > 1 else []
    note = "; ".join([*([unit] if unit else []), *thinned, *notes])
    return Chart(title, Markup(draw_curves(name, drawn, title)), note)


def _measurement(scorecard: Scorecard) -> list[Table]:
    rows = [
        ("base model", scorecard.base_model),
        ("base hash", scorecard.base_hash),
        ("artifact hash", scorecard.artifact_hash),
        ("protocol hash", scorecard.protocol_hash),
    ]
    protocol = [(key.replace("_", " "), text.value_text(key, value)) for key, value in scorecard.protocol.items()]
    tables = [Table("What was scored", rows), Table("Protocol", protocol)]
    return [*tables, *_tables("Versions that scored", scorecard.versions)]


def _plan(path: Path) -> list[Table]:
    plan = _read_object(path)
    return [Table("Plan", [(key.replace("_", " "), value) for key, value in text.flatten(plan)])] if plan else []


def _lineage(path: Path) -> list[Table]:
    """One table for what stands at the top of lineage.json, then one for every object in it."""
    lineage = _read_object(path)
    nested = {key: value for key, value in lineage.items() if isinstance(value, dict) and value}
    plain = {key: value for key, value in lineage.items() if key not in nested}
    tables = _tables("Lineage", plain)
    return tables + [table for key, value in nested.items() for table in _tables(f"Lineage: {_words(key)}", value)]


def lineage_rows(path: Path) -> KeyValues:
    """What stands at the top of lineage.json, and its parent; versions and long tables are left to the run's report."""
    lineage = _read_object(path)
    kept = {key: value for key, value in lineage.items() if not isinstance(value, dict | list) or key == "parent"}
    return [(key.replace("_", " "), value) for key, value in text.flatten(kept)]


def _tables(title: str, value: dict[str, Any]) -> list[Table]:
    rows = list(text.flatten(value))
    return [Table(title, rows, folded=len(rows) > _MAX_OPEN_ROWS)] if rows else []


def _words(key: str) -> str:
    return key.replace("_", " ")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise fail(f"this is not JSON: {error}", str(path), "restore the file, or remove it") from None
    if not isinstance(value, dict):
        raise fail("a JSON object is wanted here", str(path), "restore the file, or remove it")
    return value
