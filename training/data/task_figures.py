"""Losses, rows and target tokens of a step, task by task."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from training.data.mixture import Task


class TaskFigures:
    """Adds up what examples say by the task that they belong to; rows to replay belong to none.

    Args:
        terms: how many terms an example's loss is a sum of: its target tokens, or one for a pair.
        num_targets: an example's target tokens.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        terms: Callable[[int], int],
        num_targets: Callable[[int], int],
        device: torch.device,
    ) -> None:
        self._tasks, self._terms, self._num_targets = tuple(tasks), terms, num_targets
        self._firsts = [task.first for task in tasks]
        self._end = tasks[-1].first + tasks[-1].size if tasks else 0
        self._device = device

    def __len__(self) -> int:
        return len(self._tasks)

    def sums(self, examples: Sequence[int], losses: torch.Tensor) -> torch.Tensor:
        """(tasks,) the losses (examples,) of a micro-batch, summed by task."""
        sums = torch.zeros(len(self._tasks) + 1, device=self._device)
        if self._tasks and examples:
            places = torch.tensor([self._place(index) for index in examples], device=self._device)
            sums.index_add_(0, places, losses)
        return sums[:-1]

    def row(self, examples: Sequence[int], sums: Sequence[float]) -> dict[str, Any]:
        """What a step's row in the metrics says of every task in the global batch, by name; nothing without tasks."""
        by_task: list[list[int]] = [[] for _ in range(len(self._tasks) + 1)]
        for index in examples:
            by_task[self._place(index)].append(index)
        parts = zip(self._tasks, by_task, sums, strict=False)
        found = {task.name: self._figures(inside, total) for task, inside, total in parts if inside}
        return {"tasks": found} if found else {}

    def _figures(self, examples: Sequence[int], total: float) -> dict[str, float | int | None]:
        terms = sum(self._terms(index) for index in examples)
        return {
            "loss": total / terms if terms else None,  # none, when every target is masked
            "num_rows": len(examples),
            "num_target_tokens": sum(self._num_targets(index) for index in examples),
        }

    def _place(self, index: int) -> int:
        return bisect_right(self._firsts, index) - 1 if index < self._end else len(self._tasks)
