"""The report's table of tasks: what was asked for and seen of each, and where its losses went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.reporting.curves import Points, TaskTotals

# A single batch's loss is noisy: losses at the start and the end are means over this share of the steps.
_ENDS = 0.1


@dataclass(frozen=True)
class TaskRow:
    """One task as text: rows, their share and the share asked for, target tokens, losses from the start to the end."""

    name: str
    num_rows: str
    row_share: str
    asked_share: str
    target_tokens: str
    training_loss: str
    validation_loss: str


def task_rows(totals: Sequence[TaskTotals], validation: Mapping[str, Points], plan: Mapping[str, Any]) -> list[TaskRow]:
    """A row for every task that was seen. The suite of a task's name is its validation."""
    asked = {task["name"]: task["asked_share"] for task in plan.get("tasks", ())}
    return [
        TaskRow(
            name=task.name,
            num_rows=f"{task.num_rows:,}",
            row_share=f"{task.row_share:.1%}",
            asked_share=f"{asked[task.name]:.1%}" if task.name in asked else "–",
            target_tokens=f"{task.num_target_tokens:,} ({task.target_token_share:.1%})",
            training_loss=_from_to(task.losses, max(1, round(len(task.losses) * _ENDS))),
            validation_loss=_from_to(validation.get(task.name, ()), 1),
        )
        for task in totals
    ]


def _from_to(points: Points, ends: int) -> str:
    values = [value for _, value in points]
    if not values:
        return "–"
    first, last = values[:ends], values[-ends:]
    return f"{sum(first) / len(first):.3f} → {sum(last) / len(last):.3f}"
