"""Reports of a sweep: in the terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sweeps import words
from sweeps.importance import Importance, importances
from sweeps.pareto import REFERENCE, find_knee, hypervolume, name_of, on_validation, pareto_front, place_of, rank
from sweeps.plots import axis_text, draw_finalists, draw_front, draw_importance, draw_parallel, parallel_axes
from sweeps.result import Finalist, Point, SweepResult
from training.reporting.formatting import SIGNS, duration_text, printable
from training.reporting.html import environment
from training.reporting.plots import COLOURS
from training.workspace import write_text

MAX_FRONT_ROWS = 12


@dataclass(frozen=True)
class FrontRow:
    """A point of the front as text; `mark` says whether it is the winner or the knee."""

    name: str
    strategy: str
    gain: str
    gain_interval: str
    retention: str
    retention_interval: str
    contract: str
    kl: str
    cost: str
    price: str
    mark: str


@dataclass(frozen=True)
class StrategyRow:
    """What a strategy's trials came to and cost."""

    strategy: str
    trials: str
    best_gain: str
    best_kept: str
    on_front: int
    cost: str
    tokens: str
    price: str


def ranked_finalists(result: SweepResult) -> list[Finalist]:
    """The winner first, then the runners-up, best first."""
    ranked = rank(on_validation(result.finalists))
    winner = words.winning(result)
    return [winner, *(one for one in ranked if one != winner)] if winner else ranked


def front_rows(result: SweepResult, price: float | None) -> list[FrontRow]:
    """The front from the most retained to the most gained, with what each point's trial cost."""
    front = pareto_front(on_validation(result.points))
    knee = find_knee(front)
    return [_front_row(result, point, point is knee, price) for point in front]


def _front_row(result: SweepResult, point: Point, is_knee: bool, price: float | None) -> FrontRow:
    won = result.winner is not None and (point.trial, point.alpha) == (result.winner.trial, result.winner.alpha)
    return FrontRow(
        name=name_of(point),
        strategy=point.strategy,
        gain=words.gain_text(result, point.gain.value),
        gain_interval=words.gain_interval(result, point.gain),
        retention=words.retention_text(point.retention.value),
        retention_interval=words.retention_interval(point.retention),
        contract=point.contract,
        kl="–" if point.kl_to_base is None else f"{point.kl_to_base:.3f}",
        cost=words.hours_text(point.gpu_hours) if _on_gpus(result) else words.tokens_text(point.tokens),
        price=words.money_text(point.gpu_hours, price),
        mark=", ".join(word for word, is_so in (("winner", won), ("knee", is_knee)) if is_so),
    )


def strategy_rows(result: SweepResult, price: float | None) -> list[StrategyRow]:
    front = pareto_front(on_validation(result.points))
    rows = []
    for strategy in result.strategies:
        trials = [trial for trial in result.trials if trial.strategy == strategy]
        kept = [p for p in on_validation(result.points) if p.strategy == strategy and p.contract == "kept"]
        best = max(kept, key=lambda point: point.gain.value, default=None)
        hours = sum(trial.gpu_hours for trial in trials)
        rows.append(
            StrategyRow(
                strategy=strategy,
                trials=_states([trial.state for trial in trials if trial.rerun_of is None]),
                best_gain=words.gain_text(result, best.gain.value) if best else "–",
                best_kept=words.retention_text(best.retention.value) if best else "–",
                on_front=sum(point.strategy == strategy for point in front),
                cost=words.hours_text(hours) if _on_gpus(result) else duration_text(sum(t.seconds for t in trials)),
                tokens=words.tokens_text(sum(trial.tokens for trial in trials)),
                price=words.money_text(hours, price),
            )
        )
    return rows


def _states(states: Sequence[str]) -> str:
    told = ", ".join(f"{states.count(s)} {s}" for s in ("stopped", "failed") if s in states)
    return f"{len(states)} ({told})" if told else str(len(states))


def _on_gpus(result: SweepResult) -> bool:
    return any(trial.gpu_hours for trial in result.trials)


def volume_text(result: SweepResult) -> str:
    """The hypervolume of the front, its reference said."""
    volume = hypervolume((place_of(point) for point in on_validation(result.points)), REFERENCE)
    return f"{volume:.4f} above gain {REFERENCE[0]:g} and retention {REFERENCE[1]:g}"


# ------------------------------------------------------------------------------------------------ terminal


def print_sweep(console: Console, result: SweepResult, price: float | None = None) -> None:
    """Print the verdict, what to do, the finalists, the front, what mattered, what it cost and what failed."""
    found = importances(result)
    state, verdict = words.headline(result)
    style = "bold cyan" if state == "kept" else "bold yellow"
    console.print(_plain(f"{SIGNS[state]} {verdict}: sweep {result.name}", style))
    for line in words.recommendation(result, found):
        console.print(Padding(_plain(line), (0, 0, 0, 2)))
    if result.finalists:
        console.print(Padding(_finalist_table(result), (1, 0, 0, 0)))
    if result.points:
        console.print(Padding(_front_table(result, price), (1, 0, 0, 0)))
        console.print(Text(f"The Pareto front; hypervolume {volume_text(result)}.", "dim"))
    console.print(Padding(_strategy_table(result, price), (1, 0)))
    for one in found:
        if one.strategy is None:
            console.print(_plain(_importance_text(one)))
    _print_causes(console, result)
    for what, amount in words.budget_rows(result, price):
        console.print(Text.assemble((f"{what:<12} ", "dim"), amount))


def _finalist_table(result: SweepResult) -> Table:
    table = _table("finalist", "seeds>", "gain>\n[95 %]", "retention>\n[95 %]", "contract")
    for one in ranked_finalists(result):
        table.add_row(
            _stacked(words.described(one), one.trial),
            str(len(one.seeds)),
            _stacked(words.gain_text(result, one.gain.value), words.gain_interval(result, one.gain)),
            _stacked(words.retention_text(one.retention.value), words.retention_interval(one.retention)),
            _plain(one.contract, "cyan" if one.contract == "kept" else "bold yellow"),
        )
    return table


def _front_table(result: SweepResult, price: float | None) -> Table:
    rows = front_rows(result, price)
    cost = "GPU time>" if _on_gpus(result) else "tokens>"
    table = _table("on the front", "gain>", "retention>", "contract", cost, *(["price>"] if price is not None else []))
    shown = rows if len(rows) <= MAX_FRONT_ROWS else rows[:: -(-len(rows) // MAX_FRONT_ROWS)]
    for row in shown:
        name = Text.assemble(_plain(row.name), (f"  {row.mark}", "bold") if row.mark else "")
        cells: list[str | Text] = [name, row.gain, row.retention, row.contract, row.cost]
        table.add_row(*cells, *([row.price] if price is not None else []))
    return table


def _strategy_table(result: SweepResult, price: float | None) -> Table:
    table = _table("strategy", "trials", "best gain>\nthat is kept", "retention>\nthere", "on front>", "cost>")
    for row in strategy_rows(result, price):
        cost = _stacked(row.cost, row.price) if price is not None else Text(row.cost)
        cells = (row.trials, row.best_gain, row.best_kept, str(row.on_front))
        table.add_row(_plain(row.strategy), *cells, cost)
    return table


def _importance_text(one: Importance) -> str:
    if one.refused:
        return f"what mattered for {one.measure}: not told; {one.refused}"
    told = ", ".join(f"{share.path} {100 * share.share:.0f} %" for share in one.shares if share.matters)
    return f"what mattered for {one.measure} (fANOVA, {one.num_trials} settings): {told or 'nothing beyond chance'}"


def _print_causes(console: Console, result: SweepResult) -> None:
    for state in ("failed", "stopped"):
        for cause, names in words.causes(result, state):
            told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            console.print(Text.assemble((f"{state} ", "bold"), _plain(f"{told}: {cause}")))


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading.replace(">", ""), justify="right" if ">" in heading else "left", overflow="fold")
    return table


def _stacked(first: str, second: str) -> Text:
    return Text.assemble(_plain(first), "\n", _plain(second, "dim"))


def _plain(body: str, style: str = "") -> Text:
    return Text(printable(body), style)


# ------------------------------------------------------------------------------------------------ page


@dataclass(frozen=True)
class ImportanceChart:
    """A measure over all strategies or within one: its bars, or why there are none."""

    title: str
    svg: Markup | None
    note: str


def write_sweep_report(path: Path, result: SweepResult, price: float | None = None) -> Path:
    """Write the page of a sweep, and the winner's spec beside it (winner.yaml); each whole or as it was.

    Args:
        price: what a GPU hour costs, in the reader's own currency.
    """
    write_text(path, render_sweep(result, price))
    if result.winner:
        write_text(path.with_name("winner.yaml"), result.winner.spec_yaml)
    return path


def render_sweep(result: SweepResult, price: float | None = None) -> str:
    """The page of a sweep as one HTML document."""
    found = importances(result)
    state, verdict = words.headline(result)
    points, finalists = on_validation(result.points), ranked_finalists(result)
    paths, left_out = parallel_axes(result, found)
    return (
        environment()
        .get_template("sweep.html.j2")
        .render(
            result=result,
            state=state,
            verdict=verdict,
            advice=words.recommendation(result, found),
            front_svg=Markup(draw_front(result)) if points else None,
            volume=volume_text(result),
            finalists=finalists,
            finalists_svg=Markup(draw_finalists(result, finalists)) if finalists else None,
            parallel_svg=Markup(draw_parallel(result, paths)) if points else None,
            left_out=[axis_text(axis) for axis in left_out],
            importance=[_chart(index, one) for index, one in enumerate(found)],
            front=front_rows(result, price),
            strategies=strategy_rows(result, price),
            on_gpus=_on_gpus(result),
            price=price,
            budget=words.budget_rows(result, price),
            failed=words.causes(result, "failed"),
            stopped=words.causes(result, "stopped"),
            hashes=sorted(result.hashes.items()),
            words=words,
            colours=COLOURS,
        )
    )


def _chart(index: int, one: Importance) -> ImportanceChart:
    scope = "over all strategies" if one.strategy is None else f"within {one.strategy}"
    svg = None if one.refused else Markup(draw_importance(f"importance-{index}", one))
    note = one.refused or f"{one.num_trials} settings, as they were at rung {one.rung}"
    return ImportanceChart(f"{one.measure.capitalize()}, {scope}", svg, note)
