"""The report's charts, as SVG that stands inside an HTML page and takes its colours from the page's CSS.

matplotlib is imported where it draws, so that reading a scorecard in the terminal does not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from training.evaluation.scorecard import SuiteScore
from training.reporting.formatting import SIGNS, change_text, interval_text, is_share, least_change

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

# name: (light, dark). Charts are drawn in the light colours, which then become var(--name). The series are
# from Okabe and Ito's palette, told apart by colour-blind readers, and each has its own marker or dash besides.
COLOURS = {
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#59636e", "#9aa4af"),
    "rule": ("#d8dde3", "#343b43"),
    "accent": ("#0072b2", "#5ab4e8"),
    "warn": ("#b84e00", "#f08a3c"),
    "series-3": ("#009e73", "#2fc49a"),
    "series-4": ("#cc79a7", "#dd9cc0"),
    "series-5": ("#c98a00", "#e8b84a"),
    "series-6": ("#6b7f94", "#8fa3b8"),
}
_SERIES = ("accent", "warn", "series-3", "series-4", "series-5", "series-6")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vX"
# 5 inches are 360 units of the view box: near a phone's width, so text keeps its size there.
_WIDTH_INCHES = 5.0
_MAX_POINTS = 400
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Line:
    """One named curve: (step, value) pairs, or (alpha, value)."""

    name: str
    points: Sequence[tuple[float, float]]


def draw_changes(suites: Sequence[SuiteScore]) -> str:
    """Every suite's change with its 95 % interval and the least that the contract asks, one panel per unit."""
    panels = [[suite for suite in suites if is_share(suite) is share] for share in (True, False)]
    panels = [panel for panel in panels if panel]
    heights = [0.55 * len(panel) + 0.62 for panel in panels]
    with open_figure(sum(heights)) as figure:
        top = sum(heights)
        for panel, height in zip(panels, heights, strict=True):
            bottom = (top - height + 0.55) / sum(heights)
            axes = figure.add_axes((0.0, bottom, 0.98, (height - 0.62) / sum(heights)))
            _draw_panel(axes, panel)
            top -= height
        return to_svg(figure, "changes", "Change of every suite with its 95 % interval")


def draw_curves(name: str, lines: Sequence[Line], title: str, across: str = "step") -> str:
    """Curves over optimizer steps (or what `across` says), in one panel; a legend when there are several.

    Args:
        name: prefix of the ids in the SVG, unlike that of any other chart on the page.
        title: what a screen reader says.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    legend_inches = 0.22 * ((len(lines) + 1) // 2) + 0.15 if len(lines) > 1 else 0.0
    height = 2.55 + legend_inches
    with open_figure(height) as figure:
        axes = figure.add_axes((0.14, (0.53 + legend_inches) / height, 0.82, 1.92 / height))
        for index, line in enumerate(lines):
            _draw_line(axes, index, line)
        _style_axes(axes)
        axes.set_xlabel(across, color=light_colour("muted"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=across == "step"))
        if max(abs(value) for line in lines for _, value in line.points) < 0.01:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _small_tick(value)))
        axes.grid(axis="y", color=light_colour("rule"), linewidth=0.8)
        if legend_inches:
            figure.legend(
                loc="lower left", ncols=2, frameon=False, labelcolor=light_colour("ink"), bbox_to_anchor=(0.1, 0)
            )
        return to_svg(figure, name, title)


def draw_histogram(name: str, edges: Sequence[float], counts: Sequence[int], title: str, limit: float) -> str:
    """Counts of rows between edges of lengths in tokens, with a line at `limit` where it is among them.

    Args:
        name: prefix of the ids in the SVG, unlike that of any other chart on the page.
        title: what a screen reader says.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with open_figure(2.3) as figure:
        axes = figure.add_axes((0.14, 0.24, 0.82, 0.68))
        axes.stairs(counts, edges, fill=True, color=light_colour("accent"), edgecolor=light_colour("accent"))
        if edges[0] > 0 and edges[-1] - edges[-2] > 2 * (edges[1] - edges[0]):
            axes.set_xscale("log")
        if limit <= edges[-1]:
            _mark_limit(axes, limit)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set_xlabel("tokens a row", color=light_colour("muted"))
        axes.grid(axis="y", color=light_colour("rule"), linewidth=0.8)
        axes.set_axisbelow(True)
        _style_axes(axes)
        return to_svg(figure, name, title)


def _mark_limit(axes: Axes, limit: float) -> None:
    """A line at the longest row allowed, its name on the side with more room."""
    axes.axvline(limit, color=light_colour("warn"), linewidth=1.6, linestyle="--")
    across, _ = axes.transLimits.transform(axes.transScale.transform((limit, 1)))
    side = 1 if across < 0.6 else -1
    axes.annotate(
        "max_length",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5 * side, -4),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="top",
        color=light_colour("warn"),
    )


def points_per_mean(points: Sequence[tuple[float, float]]) -> int:
    """How many steps one drawn point is the mean of; long curves are thinned, so that the page stays small."""
    return -(-len(points) // _MAX_POINTS) if points else 1


def light_colour(name: str) -> str:
    return COLOURS[name][0]


@contextmanager
def open_figure(height_inches: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH_INCHES, height_inches))


def _draw_panel(axes: Axes, suites: Sequence[SuiteScore]) -> None:
    scale = 100.0 if is_share(suites[0]) else 1.0
    for row, suite in enumerate(suites):
        _draw_change(axes, row, suite, scale)
    # Short lines, row by row: one through the whole panel would cross the words.
    rows = range(len(suites))
    axes.vlines(
        [0.0] * len(suites),
        [r - 0.24 for r in rows],
        [r + 0.24 for r in rows],
        colors=light_colour("muted"),
        linewidth=1,
    )
    axes.set_ylim(len(suites) - 0.6, -0.75)
    axes.margins(x=0.08)
    axes.set_yticks([])
    _style_axes(axes)
    unit = "percentage points" if scale > 1 else " or ".join(dict.fromkeys(suite.unit for suite in suites))
    axes.set_xlabel(f"worse ← {unit} → better", color=light_colour("muted"))


def _draw_change(axes: Axes, row: int, suite: SuiteScore, scale: float) -> None:
    target = suite.role == "target"
    colour = light_colour("accent" if target else "warn")
    low, high = (value * scale for value in suite.interval)
    least = least_change(suite) * scale
    axes.plot([low, high], [row, row], color=colour, linewidth=2.5, solid_capstyle="round", zorder=2)
    axes.plot([suite.change * scale], [row], marker="o" if target else "s", markersize=7, color=colour, zorder=3)
    axes.vlines(
        least, row - 0.22, row + 0.22, colors=light_colour("ink"), linewidth=1.5, linestyle=(0, (2, 1)), zorder=4
    )
    across = axes.get_yaxis_transform()
    value = f"{change_text(suite, suite.change)} {interval_text(suite)}"
    axes.text(0, row - 0.38, shortened(suite.name), transform=across, color=light_colour("ink"), fontweight="bold")
    note = value if suite.kept else f"{SIGNS[suite.verdict]} {value}"
    axes.text(1, row - 0.38, note, transform=across, ha="right", color=light_colour("ink"))


def shortened(name: str, limit: int = 20) -> str:
    """The name with its middle left out where it would run into the figures beside it."""
    half = limit // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half + 1 :]}"


def _draw_line(axes: Axes, index: int, line: Line) -> None:
    points = _thinned(line.points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = _MARKERS[index % len(_MARKERS)] if len(points) <= 40 else ""
    colour = light_colour(_SERIES[index % len(_SERIES)])
    dash = _DASHES[index % len(_DASHES)]
    axes.plot(steps, values, dash, marker=marker, markersize=4, linewidth=1.6, color=colour, label=shortened(line.name))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The curve as means over equal numbers of neighbouring steps."""
    size = points_per_mean(points)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in chunk) / len(chunk), sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]


def _small_tick(value: float) -> str:
    """Short enough for the margin, whole in itself: 1.5e-4 rather than 0.00015 or a factor above the axis."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def _style_axes(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines["bottom"].set_color(light_colour("rule"))
    axes.tick_params(colors=light_colour("muted"), color=light_colour("rule"), length=3)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an inline SVG element: colours from CSS, ids of its own, no namespace or metadata address."""
    figure.patch.set_visible(False)
    out = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        figure.savefig(out, format="svg", metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # its selector would reach the whole page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
