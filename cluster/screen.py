"""What the user sees: a console of our own, progress of a run, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from training.errors import TenureError

_POLL_S = 0.3
_PLAIN_EVERY_S = 15.0


def make_screen() -> Console:
    """A console on a copy of standard output, which stays the user's while libraries' output goes to a log."""
    terminal = sys.stdout.isatty()
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    return Console(file=stream, force_terminal=terminal, highlight=False, width=None if terminal else 110)


def print_error(error: TenureError) -> None:
    """Every problem on standard error, one below the other."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for problem in error.problems:
        console.print(f"[bold red]error:[/] {escape(str(problem))}")


def facts(rows: dict[str, str]) -> Table:
    """Names and values below each other."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows below the names of their columns."""
    made = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


@contextmanager
def progress(console: Console, metrics: Path, steps: int) -> Iterator[None]:
    """Follow a run's metrics file on screen while the body runs: a bar on a terminal, plain lines elsewhere."""
    stop = threading.Event()
    follow = _follow_bar if console.is_terminal else _follow_lines
    thread = threading.Thread(target=follow, args=(console, metrics, steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Tail:
    """New whole rows of a metrics file that may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0

    def rows(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _rounds(metrics: Path, stop: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """Rows as they come, and once more after the stop."""
    tail = _Tail(metrics)
    while not stop.wait(_POLL_S):
        yield tail.rows()
    yield tail.rows()


class _Speed:
    """Tokens per second and time left, from the steps seen."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        self.tokens += row["num_tokens"]
        self.seconds += row["seconds"]
        self.count += 1

    def left(self, step: int, steps: int) -> str:
        per_second = self.tokens / self.seconds if self.seconds else 0.0
        left = (steps - step) * self.seconds / max(1, self.count)
        return f"{per_second:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"


def _follow_bar(console: Console, metrics: Path, steps: int, stop: threading.Event) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    speed = _Speed()
    with Progress(*columns, TextColumn("{task.fields[told]}"), console=console) as bar:
        task = bar.add_task("starting workers", total=steps, told="")
        for rows in _rounds(metrics, stop):
            for row in rows:
                if row["kind"] == "step":
                    speed.add(row)
                    told = f"loss {row['loss']:.3f}, {speed.left(row['step'], steps)}"
                    bar.update(task, description="training", completed=row["step"], told=told)


def _follow_lines(console: Console, metrics: Path, steps: int, stop: threading.Event) -> None:
    speed, last = _Speed(), 0.0
    for rows in _rounds(metrics, stop):
        for row in rows:
            if row["kind"] == "step":
                speed.add(row)
                if time.monotonic() - last > _PLAIN_EVERY_S or row["step"] == steps:
                    last = time.monotonic()
                    left = speed.left(row["step"], steps)
                    console.print(f"step {row['step']}/{steps}  loss {row['loss']:.3f}  {left}")
