"""Reports of a task sequence: its matrix in the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from training.reporting.formatting import printable
from training.reporting.html import environment
from training.reporting.plots import COLOURS
from training.sequences.plots import cell_text, draw_heat_map, just_learned, row_labels
from training.sequences.result import SequenceResult

FIGURES = {
    "average_accuracy": ("average", "mean over tasks, after the last one"),
    "backward_transfer": ("backward transfer", "what later tasks did to earlier ones; negative is forgetting"),
    "forward_transfer": ("forward transfer", "what earlier tasks did to a task before it was learned"),
    "forgetting": ("forgetting", "the way down from each task's best earlier score; positive is forgetting"),
}


def print_sequence(console: Console, result: SequenceResult) -> None:
    """Print the matrix, what it comes to, and what each task lost."""
    console.print(Text(f"sequence {result.sequence}: every suite after every task", "bold"))
    console.print(Padding(_table(result), (1, 0)))
    console.print(Text("Brackets: the task just learned. Of nats, lower is better. –: not scored.", "dim"))
    for name, value, meaning in figure_rows(result):
        console.print(Text.assemble(f"{name:<18}", (f"{value:>10}", "bold"), (f"  {meaning}", "dim")))
    for line in unlike_lines(result):
        console.print(Text(line, "bold yellow"))
    if result.figures is None and result.num_learned and not result.unlike:
        console.print(Text(_UNITS_DIFFER, "dim"))
    if result.forgotten:
        told = ", ".join(f"{task} {value}" for task, value in forgotten_rows(result))
        console.print(f"forgotten by task: {told}")


_UNITS_DIFFER = "The tasks' suites have different units, so there are no figures over all of them."


def unlike_lines(result: SequenceResult) -> list[str]:
    """What is said where the runs' protocols differ: nothing is computed of such scores."""
    if not result.unlike:
        return []
    head = "The runs were scored under different protocols, so there are no figures over them:"
    return [head, *(printable(line) for line in result.unlike)]


def figure_rows(result: SequenceResult) -> list[tuple[str, str, str]]:
    """Name, value and meaning of every figure that there is."""
    if result.figures is None:
        return []
    share = result.columns[0].unit == "share"
    found = []
    for key, (name, meaning) in FIGURES.items():
        value = getattr(result.figures, key)
        if value is not None:
            found.append((name, _figure_text(value, share, signed=key != "average_accuracy"), meaning))
    return found


def _figure_text(value: float, share: bool, signed: bool) -> str:
    """In percentage points where it is a difference of shares; an average of nats has its sign turned back."""
    if not signed:
        return f"{100 * value:.1f} %" if share else f"{-value:.3f}"
    rounded = round(100 * value, 1) if share else round(value, 3)
    text = f"{rounded + 0:+.1f} pts" if share else f"{rounded + 0:+.3f}"
    return text.replace("-", "−")


def forgotten_rows(result: SequenceResult) -> list[tuple[str, str]]:
    """What was forgotten of every task but the last one."""
    share = {column.task: column.unit == "share" for column in result.columns if column.stands_for_task}
    return [(task, _figure_text(value, share[task], signed=True)) for task, value in result.forgotten.items()]


def _table(result: SequenceResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("after")
    for column in result.columns:
        unit = "" if column.unit == "share" else f"\n{column.unit}"
        table.add_column(f"{printable(column.suite)}{unit}", justify="right", overflow="fold")
    table.add_column("contract")
    for row, label in enumerate(row_labels(result)):
        cells = [_cell(result, row, index) for index in range(len(result.columns))]
        table.add_row(label, *cells, result.rows[row].contract or "")
    return table


def _cell(result: SequenceResult, row: int, index: int) -> Text:
    text = cell_text(result.columns[index], result.score(row, index))
    return Text(f"[{text}]", "bold cyan") if just_learned(result, row, index) else Text(text)


def write_sequence_report(path: Path, result: SequenceResult) -> None:
    """Write the page of a sequence; a reader sees the old one or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(render_sequence(result), encoding="utf-8")
    part.replace(path)


def render_sequence(result: SequenceResult) -> str:
    """The page of a sequence as one HTML document."""
    tasks = [index for index, column in enumerate(result.columns) if column.stands_for_task]
    others = [index for index, column in enumerate(result.columns) if not column.stands_for_task]
    title = f"Scores of {len(tasks)} tasks after each of them"
    return (
        environment()
        .get_template("sequence.html.j2")
        .render(
            result=result,
            heat_map=Markup(draw_heat_map("tasks", title, result, tasks)),
            others=Markup(draw_heat_map("others", "Other suites after each task", result, others)) if others else None,
            figures=figure_rows(result),
            units_differ=_UNITS_DIFFER if result.figures is None and not result.unlike else None,
            unlike=unlike_lines(result),
            forgotten=forgotten_rows(result),
            rows=list(zip(row_labels(result), result.rows, strict=True)),
            colours=COLOURS,
        )
    )
