"""The heat map of a task sequence: a row for each model, a column for each suite, the score in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.reporting.plots import light_colour, open_figure, shortened, to_svg
from training.sequences.result import Column, SequenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One hue from light to dark: lightness alone tells the order, to colour-blind readers and in grey print too. The
# cells keep their colours on a dark page, and so does what is written in them.
_WORST, _BEST = (0.93, 0.95, 0.98), (0.03, 0.25, 0.50)
_DARK_TEXT, _LIGHT_TEXT = "#101418", "#fefefe"
_ROW_INCHES, _LINE_INCHES = 0.44, 0.19
_LABEL_SHARE = 0.27
_MOST_UPRIGHT, _LEAST_COLUMNS = 4, 3
_LIGHT_TEXT_FROM = 0.66  # where white on the cell gets easier to read than black


def draw_heat_map(name: str, title: str, result: SequenceResult, columns: Sequence[int]) -> str:
    """The scores of some columns after every task, as an SVG element; see report_plots for its colours.

    Args:
        name: prefix of the ids in the SVG, unlike that of any other chart on the page.
        title: what a screen reader says.
        columns: indices into the result's columns.
    """
    slanted = len(columns) > _MOST_UPRIGHT
    lines = 1 + any(result.columns[index].unit != "share" for index in columns)
    head = _LINE_INCHES * lines + 0.12 + (0.5 if slanted else 0.0)
    height = head + _ROW_INCHES * len(result.rows) + 0.05
    with open_figure(height) as figure:
        body = _ROW_INCHES * len(result.rows) / height
        axes = figure.add_axes((_LABEL_SHARE, 0.05 / height, 1 - _LABEL_SHARE, body))
        for place, index in enumerate(columns):
            _draw_column(axes, place, index, result)
            _write_head(axes, place, result.columns[index], slanted)
        for row, label in enumerate(row_labels(result)):
            axes.text(-0.58, row, shortened(label, 16), ha="right", va="center", color=light_colour("ink"))
        axes.set_xlim(-0.5, max(len(columns), _LEAST_COLUMNS) - 0.5)
        axes.set_ylim(len(result.rows) - 0.5, -0.5)
        axes.set_axis_off()
        return to_svg(figure, name, title)


def row_labels(result: SequenceResult) -> list[str]:
    """The base, and the model after each task."""
    return ["base", *(f"{index}. {row.task}" for index, row in enumerate(result.rows[1:], start=1))]


def cell_text(column: Column, score: float | None) -> str:
    """A share as a percentage, nats with three decimals; a dash where nothing was scored."""
    if score is None:
        return "–"
    return f"{100 * score:.1f} %" if column.unit == "share" else f"{score:.3f}"


def shades(result: SequenceResult, index: int) -> list[float | None]:
    """How dark the cells of a column are, from 0 to 1: a share is as dark as it is large, of nats the least is 1.

    Nats are shaded from the column's worst to its best. A column of one value is neither, and so in the middle.
    """
    column, scores = result.columns[index], [row.scores[index] for row in result.rows]
    if column.unit == "share":
        return scores
    known = [score for score in scores if score is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high == low:
        return [None if score is None else 0.5 for score in scores]
    return [None if score is None else (high - score) / (high - low) for score in scores]


def just_learned(result: SequenceResult, row: int, index: int) -> bool:
    """Whether a cell is of the task that was learned last before it was scored."""
    task = result.columns[index].task
    return task is not None and result.rows[row].task == task


def _draw_column(axes: Axes, place: int, index: int, result: SequenceResult) -> None:
    from matplotlib.patches import Rectangle

    for row, shade in enumerate(shades(result, index)):
        text = cell_text(result.columns[index], result.score(row, index))
        if shade is None:
            axes.text(place, row, text, ha="center", va="center", color=light_colour("muted"))
            continue
        colour = tuple(worst + (best - worst) * shade for worst, best in zip(_WORST, _BEST, strict=True))
        learned = just_learned(result, row, index)
        edge = {"edgecolor": light_colour("warn"), "linewidth": 2.2} if learned else {"edgecolor": "none"}
        axes.add_patch(Rectangle((place - 0.46, row - 0.44), 0.92, 0.88, facecolor=colour, **edge))
        ink = _LIGHT_TEXT if shade > _LIGHT_TEXT_FROM else _DARK_TEXT
        axes.text(place, row, text, ha="center", va="center", color=ink, fontweight="bold" if learned else "normal")


def _write_head(axes: Axes, place: int, column: Column, slanted: bool) -> None:
    name = shortened(column.suite, 12 if not slanted else 16)
    unit = "" if column.unit == "share" else f"\n{column.unit.replace('nats per ', 'nats/')}"
    turn = {"rotation": 35, "ha": "left"} if slanted else {"ha": "center"}
    axes.text(place - (0.2 if slanted else 0), -0.55, name + unit, va="bottom", color=light_colour("ink"), **turn)
