"""Reads a run's metrics.jsonl: the curves of training and what it cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.reporting.formatting import duration_text

# What objectives log beside the loss, each a mean over the global batch.
PARTS = ("cross_entropy", "divergence", "kl", "accuracy", "margin")
Points = tuple[tuple[int, float], ...]  # (step, value), steps ascending


@dataclass(frozen=True)
class TaskStep:
    """A task's part of one step: its mean loss (nan when it has no target), rows and target tokens."""

    loss: float
    num_rows: int
    num_target_tokens: int


@dataclass(frozen=True)
class Step:
    """One optimizer step; a value that was not finite is nan. `parts` are what its objective logs beside the loss."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_target_tokens: int
    num_tokens: int
    seconds: float
    num_rows: int = 0
    num_replay: int = 0
    num_replay_target_tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, TaskStep] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskTotals:
    """What a run saw of a task: rows and target tokens, their shares of all tasks', and its loss over the steps."""

    name: str
    num_rows: int
    num_target_tokens: int
    row_share: float
    target_token_share: float
    losses: Points


@dataclass(frozen=True)
class Metrics:
    """The steps that count, validation losses per suite, and what was left out."""

    steps: tuple[Step, ...]
    validation: dict[str, Points]
    num_repeated_steps: int
    repeated_seconds: float
    num_unreadable_lines: int

    def curve(self, name: str) -> Points:
        """(step, value) of one field of the steps, those that are finite."""
        points = ((step.step, float(getattr(step, name))) for step in self.steps)
        return tuple((step, value) for step, value in points if math.isfinite(value))

    @property
    def parts(self) -> dict[str, Points]:
        """(step, value) of what the objective logs beside the loss, by name."""
        names = list(dict.fromkeys(name for step in self.steps for name in step.parts))
        return {
            name: tuple((step.step, step.parts[name]) for step in self.steps if name in step.parts) for name in names
        }


def task_totals(metrics: Metrics) -> list[TaskTotals]:
    """What a run saw of every task; nothing for a run without tasks. Shares leave replayed rows out."""
    parts: dict[str, list[tuple[int, TaskStep]]] = {}
    for step in metrics.steps:
        for name, part in step.tasks.items():
            parts.setdefault(name, []).append((step.step, part))
    rows = {name: sum(part.num_rows for _, part in found) for name, found in parts.items()}
    targets = {name: sum(part.num_target_tokens for _, part in found) for name, found in parts.items()}
    return [
        TaskTotals(
            name=name,
            num_rows=rows[name],
            num_target_tokens=targets[name],
            row_share=rows[name] / sum(rows.values()),
            target_token_share=targets[name] / max(1, sum(targets.values())),
            losses=tuple((step, part.loss) for step, part in found if math.isfinite(part.loss)),
        )
        for name, found in parts.items()
    ]


def read_metrics(path: Path) -> Metrics | None:
    """The metrics in a file, or None when there is none.

    A step that was done again after a resume counts once, by its later row. A line that a crash tore is left out
    and counted.
    """
    if not path.is_file():
        return None
    steps: dict[int, Step] = {}
    losses: dict[tuple[str, int], float] = {}
    replaced: list[Step] = []
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"):
        try:
            row = _parse(line)
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if isinstance(row, Step):
            replaced += [steps[row.step]] if row.step in steps else []
            steps[row.step] = row
        elif row is not None:
            losses[row[0]] = row[1]
    return Metrics(
        steps=tuple(steps[number] for number in sorted(steps)),
        validation=_by_suite(losses),
        num_repeated_steps=len(replaced),
        repeated_seconds=sum(step.seconds for step in replaced),
        num_unreadable_lines=unreadable,
    )


@dataclass(frozen=True)
class Gpus:
    """How many GPUs a run trained on, and the price of an hour of one, in whatever currency the spec means."""

    count: int = 0
    price_per_hour: float | None = None


def cost_rows(metrics: Metrics | None, scoring_seconds: float, gpus: Gpus = Gpus()) -> list[tuple[str, str]]:
    """(what, amount) of time, tokens and GPUs; tokens per second are over the steps that count, without repeats."""
    rows: list[tuple[str, str]] = []
    if metrics and metrics.steps:
        seconds = sum(step.seconds for step in metrics.steps)
        tokens = sum(step.num_tokens for step in metrics.steps)
        rows = [
            ("optimizer steps", f"{len(metrics.steps):,}"),
            ("training time, summed over steps", duration_text(seconds)),
            ("tokens", f"{tokens:,}"),
            ("target tokens", f"{sum(step.num_target_tokens for step in metrics.steps):,}"),
            ("tokens per second", f"{tokens / seconds:,.0f}" if seconds > 0 else "–"),
        ]
        rows += _gpu_rows(seconds + metrics.repeated_seconds, gpus)
        rows += _replay_rows(metrics.steps)
        if metrics.num_repeated_steps:
            again = f"{metrics.num_repeated_steps:,} ({duration_text(metrics.repeated_seconds)})"
            rows.append(("steps done again after a resume", again))
    return [*rows, ("scoring time", duration_text(scoring_seconds))]


def _gpu_rows(seconds: float, gpus: Gpus) -> list[tuple[str, str]]:
    """Hours of GPUs in steps, those done again included, and their price; nothing for a run without GPUs."""
    hours = seconds / 3600 * gpus.count
    if not hours:
        return []
    rows = [("GPU hours of training", f"{hours:,.3f}")]
    if gpus.price_per_hour is not None:
        rows.append(("price of training", f"{hours * gpus.price_per_hour:,.2f} ({gpus.price_per_hour:g} a GPU hour)"))
    return rows


def _replay_rows(steps: tuple[Step, ...]) -> list[tuple[str, str]]:
    """The realised shares of what was replayed; nothing for a run without replay."""
    replayed, rows = sum(step.num_replay for step in steps), sum(step.num_rows for step in steps)
    if not replayed:
        return []
    tokens, targets = (sum(s.num_replay_target_tokens for s in steps), sum(s.num_target_tokens for s in steps))
    return [
        ("replayed rows", f"{replayed:,} of {rows:,} ({replayed / rows:.1%})"),
        ("replayed target tokens", f"{tokens:,} of {targets:,} ({tokens / targets:.1%})"),
    ]


def _parse(line: str) -> Step | tuple[tuple[str, int], float] | None:
    row: dict[str, Any] = json.loads(line)
    if row["kind"] == "validation":
        return (str(row["suite"]), int(row["step"])), _number(row["loss"])
    if row["kind"] != "step":
        return None
    return Step(
        step=int(row["step"]),
        loss=_number(row["loss"]),
        learning_rate=_number(row["learning_rate"]),
        grad_norm=_number(row.get("grad_norm")),
        num_target_tokens=int(row["num_target_tokens"]),
        num_tokens=int(row["num_tokens"]),
        seconds=float(row["seconds"]),
        num_rows=int(row.get("num_rows", 0)),
        num_replay=int(row.get("num_replay", 0)),
        num_replay_target_tokens=int(row.get("num_replay_target_tokens", 0)),
        parts={name: float(row[name]) for name in PARTS if name in row},
        tasks={name: _task_step(part) for name, part in row.get("tasks", {}).items()},
    )


def _task_step(row: dict[str, Any]) -> TaskStep:
    return TaskStep(_number(row["loss"]), int(row["num_rows"]), int(row["num_target_tokens"]))


def _number(value: float | None) -> float:
    # A JSON writer that refuses nan and infinity writes null.
    return math.nan if value is None else float(value)


def _by_suite(losses: dict[tuple[str, int], float]) -> dict[str, Points]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for (suite, step), loss in sorted(losses.items()):
        curves.setdefault(suite, []).extend([(step, loss)] if math.isfinite(loss) else [])
    return {suite: tuple(points) for suite, points in curves.items()}
