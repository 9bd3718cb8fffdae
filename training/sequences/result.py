"""What came of a task sequence: every suite's score after every task, and the arithmetic of forgetting over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.evaluation.scorecard import Scorecard, State, SuiteScore
from training.evaluation.transfer import forgetting_per_task, summarise
from training.sequences.spec import SequenceSpec
from training.workspace import read_json, write_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(_Record):
    """One suite. `task` is the task whose target it is, if any; `stands_for_task` says whether it is its first one."""

    suite: str
    task: str | None
    stands_for_task: bool
    metric: str
    unit: str
    higher_is_better: bool


class Row(_Record):
    """The scores of one model, in the order of the columns; None where a suite was not scored.

    The base's row has no task and no run. `model_hash` is of the model that was scored, `base_hash` of what it came
    from.
    """

    task: str | None
    run: str | None
    contract: State | None
    model_hash: str
    base_hash: str | None
    scores: tuple[float | None, ...]


class Figures(_Record):
    """The sequence in a few figures, in the unit of the tasks' suites; of cross-entropies with the sign turned.

    Formulas and sources are in training/evaluation/transfer.py. A figure that needs scores that are not there is None.
    """

    average_accuracy: float
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    num_tasks: int


class SequenceResult(_Record):
    """R: a row for the base and one for the model after each task, a column for each suite, tasks first.

    `figures` are over the tasks learned so far; None where the tasks' suites have different units, or before the first
    task is learned. `forgotten` is by task: the best earlier score less the last, positive is forgetting. `unlike` says
    what differs between the runs' protocols; then neither is there, for such scores do not compare.
    """

    schema_version: Literal[1] = 1
    sequence: str
    tasks: tuple[str, ...]
    carry: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    figures: Figures | None
    forgotten: dict[str, float]
    unlike: tuple[str, ...] = ()

    @property
    def num_learned(self) -> int:
        return len(self.rows) - 1

    def score(self, row: int, column: int) -> float | None:
        """R[row, column]; row 0 is the base."""
        return self.rows[row].scores[column]


def make_result(sequence_id: str, sequence: SequenceSpec, cards: Sequence[Scorecard]) -> SequenceResult:
    """The result of the tasks learned so far from the scorecards of their runs, in order."""
    columns = _columns(sequence, cards)
    rows = tuple(_rows(columns, sequence, cards))
    square = len(cards)
    unlike = _unlike(cards)
    figures, forgotten = (None, []) if unlike else _figures(columns[: len(sequence.tasks)], rows, square)
    tasks = tuple(task.name for task in sequence.tasks)
    return SequenceResult(
        sequence=sequence_id,
        tasks=tasks,
        carry=tuple(carried.type for carried in sequence.carry),
        columns=columns,
        rows=rows,
        figures=figures,
        forgotten=dict(zip(tasks, forgotten, strict=False)),
        unlike=unlike,
    )


def _unlike(cards: Sequence[Scorecard]) -> tuple[str, ...]:
    """What differs between the protocols of a sequence's runs, by setting; a suite that one of them lacks does not."""
    told = []
    for key in dict.fromkeys(key for card in cards for key in card.protocol):
        values = {card.run: card.protocol[key] for card in cards if key in card.protocol}
        if len(set(values.values())) > 1:
            told.append(f"{key} is " + ", ".join(f"{value!r} in {run}" for run, value in values.items()))
    return tuple(told)


def write_result(path: Path, result: SequenceResult) -> None:
    write_json(path, result.model_dump(mode="json"))


def read_result(path: Path) -> SequenceResult | None:
    """The result in a file; None before the first task is learned."""
    return SequenceResult.model_validate(read_json(path)) if path.is_file() else None


def _columns(sequence: SequenceSpec, cards: Sequence[Scorecard]) -> tuple[Column, ...]:
    """Each task's first suite, then further ones of tasks, then what else was scored, each in its own order."""
    scored: dict[str, SuiteScore] = {suite.name: suite for card in cards for suite in card.suites}
    first = {task.suites.target[0].name: task.name for task in sequence.tasks}
    further = {suite.name: task.name for task in sequence.tasks for suite in task.suites.target[1:]}
    others = dict.fromkeys(name for name in scored if name not in first and name not in further)
    metrics = {suite.name: suite.metric for task in sequence.tasks for suite in task.suites.target}
    return tuple(
        Column(
            suite=name,
            task=task,
            stands_for_task=name in first,
            metric=metrics.get(name) or scored[name].metric,
            unit=scored[name].unit if name in scored else "",
            higher_is_better=scored[name].higher_is_better if name in scored else True,
        )
        for name, task in {**first, **further, **others}.items()
        if name in scored or name in first
    )


def _rows(columns: tuple[Column, ...], sequence: SequenceSpec, cards: Sequence[Scorecard]) -> list[Row]:
    """The base from the first run's scorecard, then every run's tuned model."""
    rows = []
    for index, card in enumerate(cards):
        scores = {suite.name: suite for suite in card.suites}
        if index == 0:
            before = tuple(scores[column.suite].base if column.suite in scores else None for column in columns)
            base = Row(task=None, run=None, contract=None, model_hash=card.base_hash, base_hash=None, scores=before)
            rows.append(base)
        after = tuple(scores[column.suite].tuned if column.suite in scores else None for column in columns)
        row = Row(
            task=sequence.tasks[index].name,
            run=card.run,
            contract=card.contract.verdict,
            model_hash=card.artifact_hash,
            base_hash=card.base_hash,
            scores=after,
        )
        rows.append(row)
    return rows


def _figures(columns: tuple[Column, ...], rows: tuple[Row, ...], square: int) -> tuple[Figures | None, list[float]]:
    """The figures over the square of what was learned, and what was forgotten by task."""
    if not square:
        return None, []
    table = [[_signed(row.scores[index], columns[index]) for index in range(square)] for row in rows]
    forgotten = [float(value) for value in forgetting_per_task(table[1:])] if square > 1 else []
    if len({column.unit for column in columns[:square]}) > 1:
        return None, forgotten
    return Figures(**asdict(summarise(table[1:], table[0]))), forgotten


def _signed(score: float | None, column: Column) -> float:
    """The score as "higher is better", nan where there is none."""
    if score is None:
        return float("nan")
    return score if column.higher_is_better else -score
