"""A sweep's charts: gain against retention, finalists with intervals, settings side by side, what mattered.

As SVG inside the page, with its colours; see training/reporting/plots.py. Strategies differ by shape and by colour, and
what keeps the contract is filled, so that a chart reads in grey print and by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sweeps.importance import Importance
from sweeps.pareto import find_knee, on_validation, pareto_front
from sweeps.result import Dimension, Finalist, Measured, Point, SweepResult, Trial
from sweeps.words import (
    curve_of,
    described,
    log_share,
    short_path,
    value_text,
)
from training.reporting.plots import COLOURS, light_colour, open_figure, shortened, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = tuple(name for name in COLOURS if name in ("accent", "warn") or name.startswith("series-"))
_MARKERS = "osD^vXP*<>"
MAX_AXES = 8
_PAGE = "#ffffff"


def style_of(result: SweepResult, strategy: str) -> tuple[str, str]:
    """(colour's name, marker) of a strategy; the pairs repeat after 30."""
    index = result.strategies.index(strategy)
    return _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]


def draw_front(result: SweepResult) -> str:
    """Every point's gain and retention, the front through the best, the winner ringed, the contract's bounds dashed."""
    points = on_validation(result.points)
    rows = (len(result.strategies) + 1) // 2
    legend = 0.22 * rows + 0.1
    height = 3.3 + legend
    with open_figure(height) as figure:
        axes = figure.add_axes((0.13, (0.55 + legend) / height, 0.83, 2.65 / height))
        scale = _gain_scale(result)
        front = pareto_front(points)
        _draw_bounds(axes, points, scale)
        for trial in dict.fromkeys(point.trial for point in points):
            _draw_between(axes, result, trial, scale, strong=any(point.trial == trial for point in front))
        for strategy in result.strategies:
            _draw_points(axes, result, strategy, scale)
        _draw_steps(axes, front, scale)
        _mark(axes, result, front, scale)
        _plain_axes(axes)
        axes.grid(color=light_colour("rule"), linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"gain, {_gain_unit(result)} →", color=light_colour("muted"))
        axes.set_ylabel("retention, % →", color=light_colour("muted"))
        axes.margins(x=0.06, y=0.08)
        handles = [_key(result, strategy) for strategy in result.strategies]
        figure.legend(
            handles=handles, loc="lower left", ncols=2, frameon=False, labelcolor=light_colour("ink"),
            bbox_to_anchor=(0.08, 0), handletextpad=0.4, columnspacing=1.2,
        )  # fmt: skip
        return to_svg(figure, "front", "Gain against retention of every point, with the Pareto front")


def _key(result: SweepResult, strategy: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = style_of(result, strategy)
    return Line2D([], [], linestyle="", marker=marker, markersize=6, color=light_colour(colour),
                  label=shortened(strategy, 22))  # fmt: skip


def _draw_bounds(axes: Axes, points: Sequence[Point], scale: float) -> None:
    """What the contract asks of the least retention (a line for every suite) and of the gain."""
    suites = [suite for point in points[:1] for suite in point.suites if suite.bound is not None]
    line: dict[str, Any] = {"color": light_colour("ink"), "linewidth": 1.1, "linestyle": (0, (4, 2)), "zorder": 1}
    for bound in {round(suite.bound, 6) for suite in suites if suite.role == "retention" and suite.bound is not None}:
        axes.axhline(100 * bound, **line)
    gains = [suite.bound for suite in suites if suite.role == "target" and suite.bound]
    if gains:
        axes.axvline(scale * sum(gains) / len(gains), **line)


def _draw_between(axes: Axes, result: SweepResult, trial: str, scale: float, strong: bool) -> None:
    """The WiSE-FT curve of a trial, from the base (nothing gained, all kept) to its own point."""
    curve = curve_of(result, trial)
    if len(curve) < 2:
        return
    colour, _ = style_of(result, curve[0].strategy)
    places = [(0.0, 1.0), *((point.gain.value, point.retention.value) for point in curve)]
    axes.plot(
        [scale * gain for gain, _ in places],
        [100 * kept for _, kept in places],
        color=light_colour(colour),
        linewidth=1.2 if strong else 0.6,
        alpha=0.9 if strong else 0.35,
        zorder=2,
    )


def _draw_points(axes: Axes, result: SweepResult, strategy: str, scale: float) -> None:
    colour, marker = style_of(result, strategy)
    for point in on_validation(result.points):
        if point.strategy == strategy:
            own = point.alpha in (None, 1.0)
            axes.plot(
                [scale * point.gain.value],
                [100 * point.retention.value],
                linestyle="",
                marker=marker,
                markersize=6 if own else 3.2,
                markeredgewidth=1.1 if own else 0.7,
                color=light_colour(colour),
                markerfacecolor=light_colour(colour) if point.contract == "kept" else "none",
                zorder=4 if own else 3,
            )


def _draw_steps(axes: Axes, front: Sequence[Point], scale: float) -> None:
    """The front as what it dominates: between two points nothing better was found."""
    if front:
        gains = [scale * point.gain.value for point in front]
        kept = [100 * point.retention.value for point in front]
        axes.step(gains, kept, where="pre", color=light_colour("muted"), linewidth=1.1, zorder=2.5)


def _mark(axes: Axes, result: SweepResult, front: Sequence[Point], scale: float) -> None:
    """The winner and the knee, ringed and named."""
    marks = []
    if result.winner:
        wanted = (result.winner.trial, result.winner.alpha)
        marks += [("winner", p) for p in on_validation(result.points) if (p.trial, p.alpha) == wanted]
    knee = find_knee(front)
    if knee and not any(knee is point for _, point in marks):
        marks.append(("knee", knee))
    for label, point in marks:
        at = (scale * point.gain.value, 100 * point.retention.value)
        axes.plot(*at, marker="o", markersize=13, markerfacecolor="none", color=light_colour("ink"), zorder=5)
        axes.annotate(
            label, at, xytext=(7, 7), textcoords="offset points", color=light_colour("ink"), fontweight="bold", zorder=6
        )


def draw_finalists(result: SweepResult, ranked: Sequence[Finalist]) -> str:
    """Gain and retention of every finalist with intervals, the winner first."""
    row, foot = 0.5, 0.42
    height = row * len(ranked) + foot
    with open_figure(height) as figure:
        bottom, tall = foot / height, row * len(ranked) / height
        panels = {
            "gain": figure.add_axes((0.0, bottom, 0.47, tall)),
            "retention": figure.add_axes((0.53, bottom, 0.45, tall)),
        }
        for name, axes in panels.items():
            scale = 100.0 if name == "retention" else _gain_scale(result)
            for place, one in enumerate(ranked):
                _draw_interval(axes, place, result, one, getattr(one, name), scale)
            axes.set_ylim(len(ranked) - 0.6, -0.7)
            axes.set_yticks([])
            axes.margins(x=0.08)
            _plain_axes(axes)
        for place, one in enumerate(ranked):
            name = f"{place + 1}. {shortened(described(one), 30)}"
            across = panels["gain"].get_yaxis_transform()
            weight = "bold" if place == 0 else "normal"
            panels["gain"].text(0, place - 0.32, name, transform=across, color=light_colour("ink"), fontweight=weight)
        panels["gain"].set_xlabel(f"gain, {_gain_unit(result)} →", color=light_colour("muted"))
        panels["retention"].set_xlabel("retention, % →", color=light_colour("muted"))
        svg = to_svg(figure, "finalists", "Gain and retention of the finalists with 95 % intervals")
        return svg.replace(_PAGE, "var(--page)")


def _draw_interval(axes: Axes, row: int, result: SweepResult, one: Finalist, ends: Measured, scale: float) -> None:
    colour, marker = style_of(result, one.strategy)
    shade = light_colour(colour)
    low, value, high = (scale * end for end in (ends.low, ends.value, ends.high))
    axes.plot([low, high], [row, row], color=shade, linewidth=2.2, solid_capstyle="round", zorder=2)
    face = shade if one.contract == "kept" else _PAGE
    axes.plot([value], [row], marker=marker, markersize=7, color=shade, markerfacecolor=face, zorder=3)


def axis_of(dimension: Dimension) -> str:
    """The axis of a dimension: its path; of a protection's, with its strategies, since `0` is another one in each."""
    own = dimension.path.startswith("protections.") and dimension.strategies
    return f"{dimension.path} ({', '.join(dimension.strategies)})" if own else dimension.path


def parallel_axes(result: SweepResult, found: Sequence[Importance]) -> tuple[list[str], list[str]]:
    """The axes that are drawn side by side, those that mattered most first, and those that have no room."""
    weight: dict[str, float] = {}
    for one in found:
        for share in one.shares:
            weight[share.path] = max(weight.get(share.path, 0.0), share.share * (1.0 if one.strategy is None else 0.5))
    axes = list(dict.fromkeys(map(axis_of, result.dimensions)))
    # Among equals, what more strategies have goes first.
    worth = {
        axis_of(d): weight.get(d.path, 0.0) + 1e-6 * (len(d.strategies) or len(result.strategies))
        for d in result.dimensions
    }
    chosen = sorted(axes, key=lambda axis: -worth[axis])[: MAX_AXES - 3]
    return [axis for axis in axes if axis in chosen], [axis for axis in axes if axis not in chosen]


def axis_text(axis: str) -> str:
    """The last part of the path, and whose it is; a plus stands for further strategies."""
    path, _, own = axis.partition(" ")
    first, _, more = own.strip("()").partition(", ")
    return f"{short_path(path)} {first}{'+' if more else ''}".strip()


def draw_parallel(result: SweepResult, paths: Sequence[str]) -> str:
    """Every scored setting as a line: strategy, the dimensions, gain and retention.

    A line has a dot where it has a value; where it has no such dimension it runs on to the next one that it has.
    """
    columns = ["strategy", *paths, "gain", "retention"]
    own = {p.trial: p for p in on_validation(result.points) if p.alpha in (None, 1.0)}
    height = 3.6
    with open_figure(height) as figure:
        axes = figure.add_axes((0.06, 0.30, 0.88, 0.66))
        spans = {path: _span(result, path, list(own.values())) for path in columns}
        for trial in result.trials:
            if trial.name in own:
                _draw_setting(axes, result, trial, own[trial.name], columns, spans)
        for place, path in enumerate(columns):
            axes.vlines(place, 0, 1, colors=light_colour("muted"), linewidth=0.9, zorder=3)
            low, high = spans[path][2]
            axes.text(place, 1.03, high, ha="center", va="bottom", color=light_colour("muted"), fontsize=8.5)
            axes.text(place, -0.03, low, ha="center", va="top", color=light_colour("muted"), fontsize=8.5)
            axes.text(place + 0.1, -0.2, shortened(axis_text(path), 22), rotation=32, ha="right", va="top",
                      color=light_colour("ink"), fontsize=9.5, rotation_mode="anchor")  # fmt: skip
        axes.set_xlim(-0.35, len(columns) - 0.65)
        axes.set_ylim(-0.06, 1.05)
        axes.set_axis_off()
        return to_svg(figure, "parallel", "Every setting across the dimensions of the space")


Span = tuple[float, float, tuple[str, str]]


def _span(result: SweepResult, path: str, points: Sequence[Point]) -> Span:
    """The ends of an axis, and what they are labelled."""
    if path == "strategy":
        return 0.0, max(1.0, len(result.strategies) - 1.0), ("", "")
    if path in ("gain", "retention"):
        values = [getattr(point, path).value for point in points] or [0.0]
        scale = 100.0 if path == "retention" else _gain_scale(result)
        low, high = min(values), max(values)
        return low, high, (f"{scale * low:.3g}", f"{scale * high:.3g}")
    found = [dimension for dimension in result.dimensions if axis_of(dimension) == path]
    if found[0].kind == "category":
        return 0.0, max(1.0, len(found[0].choices) - 1.0), (str(found[0].choices[0]), str(found[0].choices[-1]))
    low, high = min(d.low or 0.0 for d in found), max(d.high or 0.0 for d in found)
    return low, high, (value_text(low), value_text(high))


def _draw_setting(
    axes: Axes, result: SweepResult, trial: Trial, point: Point, columns: Sequence[str], spans: dict[str, Span]
) -> None:
    colour, marker = style_of(result, trial.strategy)
    found = [(at, _place(result, trial, point, path, spans[path])) for at, path in enumerate(columns)]
    places = [(at, place) for at, place in found if place is not None]
    kept = point.contract == "kept"
    axes.plot(
        [at for at, _ in places],
        [place for _, place in places],
        color=light_colour(colour),
        linewidth=1.4 if kept else 0.7,
        alpha=0.95 if kept else 0.35,
        marker="o",
        markersize=2.8 if kept else 1.6,
        zorder=2 if kept else 1,
    )
    axes.plot([0], [places[0][1]], marker=marker, markersize=6, color=light_colour(colour), zorder=4)


def _place(result: SweepResult, trial: Trial, point: Point, path: str, span: Span) -> float | None:
    low, high, _ = span
    if path == "strategy":
        return 1 - log_share(float(result.strategies.index(trial.strategy)), low, high, log=False)
    if path in ("gain", "retention"):
        return log_share(getattr(point, path).value, low, high, log=False)
    dimension = _dimension(result, path, trial)
    value = trial.config.get(dimension.path) if dimension else None
    if dimension is None or value is None:
        return None
    if dimension.kind == "category":
        return log_share(float(dimension.choices.index(value)) if value in dimension.choices else 0.0, low, high, False)
    return min(1.0, max(0.0, log_share(float(value), low, high, dimension.log)))


def _dimension(result: SweepResult, path: str, trial: Trial) -> Dimension | None:
    own = (d for d in result.dimensions if axis_of(d) == path and (not d.strategies or trial.strategy in d.strategies))
    return next(own, None)


def draw_importance(name: str, one: Importance) -> str:
    """A bar for every dimension, and a tick at what chance alone gives."""
    row, foot = 0.52, 0.45
    height = row * len(one.shares) + foot
    with open_figure(height) as figure:
        axes = figure.add_axes((0.0, foot / height, 0.97, row * len(one.shares) / height))
        across = axes.get_yaxis_transform()
        for place, share in enumerate(one.shares):
            colour = light_colour("accent" if share.matters else "series-6")
            axes.barh(place + 0.12, 100 * share.share, height=0.34, color=colour, zorder=2)
            axes.vlines(100 * share.chance, place - 0.12, place + 0.36, colors=light_colour("ink"), linewidth=1.6,
                        linestyles=[(0, (2, 1))], zorder=3)  # fmt: skip
            axes.text(0, place - 0.14, shortened(share.path, 44), transform=across, color=light_colour("ink"))
            axes.text(1, place - 0.14, f"{100 * share.share:.0f} %", transform=across, ha="right",
                      color=light_colour("ink"))  # fmt: skip
        axes.set_ylim(len(one.shares) - 0.55, -0.6)
        axes.set_xlim(0, 1.05 * max(100 * max(share.share, share.chance) for share in one.shares))
        axes.set_yticks([])
        _plain_axes(axes)
        axes.set_xlabel("% of the variance", color=light_colour("muted"))
        return to_svg(figure, name, f"Share of the variance of {one.measure} by dimension")


def _plain_axes(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines["bottom"].set_color(light_colour("rule"))
    axes.tick_params(colors=light_colour("muted"), color=light_colour("rule"), length=3)


def _gain_scale(result: SweepResult) -> float:
    return 100.0 if result.gain_unit == "share" else 1.0


def _gain_unit(result: SweepResult) -> str:
    return "percentage points" if result.gain_unit == "share" else result.gain_unit
