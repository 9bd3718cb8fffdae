"""How the plan of a sweep reads: what it takes, what is unknown, and what other budgets buy."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sweeps.price import Load, Price, ladder, least_load, most_load, rung_tokens, survivors
from sweeps.words import money_text, tokens_text
from training.plan import GIB
from training.reporting.formatting import duration_text, printable


def print_price(console: Console, price: Price, gpu_hour: float | None = None) -> None:
    """Print the strategies' trials, the whole sweep, and what more and fewer trials would take.

    Args:
        gpu_hour: what a GPU hour costs, in the reader's own currency.
    """
    console.print(Padding(_strategies(price), (0, 0, 1, 0)))
    for what, told in plan_rows(price, gpu_hour):
        console.print(Text.assemble((f"{what:<14} ", "dim"), told))
    console.print(Padding(_budgets(price, gpu_hour), (1, 0, 0, 0)))
    for note in notes(price):
        console.print(Text(printable(note), "yellow"))


def plan_rows(price: Price, gpu_hour: float | None = None) -> list[tuple[str, str]]:
    """What the sweep comes to, (what, how much)."""
    search, least, most = price.search, least_load(price.search), most_load(price.search)
    reach = ", ".join(
        f"{count} to {tokens_text(tokens)}"
        for count, tokens in zip(survivors(search), rung_tokens(search), strict=True)
    )
    rows = [
        ("trials", f"{search.trials}, {price.side_by_side} side by side"),
        (
            "rungs",
            f"trials to tokens: {reach}" if search.rungs > 1 else f"one, of {tokens_text(rung_tokens(search)[-1])}",
        ),
        ("finalists", f"{search.finalists}, each under {search.seeds} seeds" if search.finalists else "none"),
        ("tokens", _range(tokens_text(least.tokens), tokens_text(most.tokens))),
        ("scorings", _range(f"{least.scorings:,}", f"{most.scorings:,}")),
        ("hours", _range(_hours(price.hours(least)), _hours(price.hours(most)))),
    ]
    if price.gpus_per_trial:
        rows.append(("GPU hours", _range(_hours(price.gpu_hours(least)), _hours(price.gpu_hours(most)))))
    if gpu_hour is not None and price.gpu_hours(least) is not None:
        ends = (money_text(price.gpu_hours(load) or 0.0, gpu_hour) for load in (least, most))
        rows.append(("price", _range(*ends)))
    if price.grid_points is not None:
        rows.append(("grid", f"{price.grid_points:,} points"))
    return rows


def notes(price: Price) -> list[str]:
    """What the figures do not hold, in words."""
    found = []
    if price.unknown:
        found.append(
            f"Hours are unknown: no run in this workspace measured a step of {', '.join(price.unknown)}. A run of a "
            "few steps with the same sizes does (training.max_steps: 20), and so does the first rung of the sweep."
        )
    elif not price.scoring_is_known:
        found.append("The hours leave scoring out: no run in this workspace measured it.")
    if price.side_by_side == 0:
        found.append("Not one trial fits into the cluster's resources.")
    if price.search.rungs > 1:
        found.append("The upper figures are those of a sweep that stops no trial; asynchronous halving lies between.")
    return found


def _strategies(price: Price) -> Table:
    table = _table("strategy", "moving>", "memory>\na worker", "steps>", "tokens/s>\nmeasured", "by run")
    for one in price.strategies:
        timing = one.timing
        speed = f"{1 / timing.seconds_per_token:,.0f}" if timing else "unknown"
        memory = f"{one.memory_bytes / GIB:.1f} GiB"
        name = Text(printable(one.name))
        table.add_row(
            name, f"{one.trainable_parameters:,}", memory, str(one.steps), speed, timing.run if timing else "–"
        )
    return table


def _budgets(price: Price, gpu_hour: float | None) -> Table:
    """Half, the whole, twice and four times the trials."""
    known = price.hours(least_load(price.search)) is not None
    headings = ["what a budget buys: trials>", "a strategy>", "tokens>", *(["hours>"] if known else [])]
    table = _table(*headings, *(["price>"] if known and gpu_hour is not None else []))
    count = price.search.trials
    for search, load in ladder(price.search, [max(1, count // 2), count, 2 * count, 4 * count]):
        cells = [str(search.trials), f"{search.trials / max(1, len(price.strategies)):.3g}", tokens_text(load.tokens)]
        table.add_row(*cells, *_known(price, load, gpu_hour))
    return table


def _known(price: Price, load: Load, gpu_hour: float | None) -> list[str]:
    hours, gpus = price.hours(load), price.gpu_hours(load)
    if hours is None or gpus is None:
        return []
    return [_hours(hours), *([money_text(gpus, gpu_hour)] if gpu_hour is not None else [])]


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else duration_text(3600 * hours)


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading.replace(">", ""), justify="right" if ">" in heading else "left", overflow="fold")
    return table
