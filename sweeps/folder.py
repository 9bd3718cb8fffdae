"""The folder of a sweep: its spec, what it shares, what every trial came to, and the result."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sweeps.result import Point, Trial
from sweeps.spec import SweepSpec
from training.errors import fail
from training.suite_spec import Suites
from training.workspace import RunFolder, Workspace, read_json, write_json


class Shared(BaseModel):
    """What is settled before the first trial: both splits of the suites, and the tokens that a trial trains on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation: Suites
    test: Suites
    tokens_per_trial: int
    mlflow_run: str | None = None
    started: str
    notes: tuple[str, ...] = ()


class Record(BaseModel):
    """A trial that has ended, its points, and the seconds that went into setup, steps, scoring and export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: Trial
    points: tuple[Point, ...] = ()
    timings: dict[str, float] = {}


@dataclass(frozen=True)
class SweepFolder:
    """Paths of one sweep; its trials' runs lie among all others."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def spec_yaml(self) -> Path:
        """The file as it was given."""
        return self.path / "sweep.yaml"

    @property
    def spec(self) -> Path:
        """The spec as it was read, with its base."""
        return self.path / "sweep.json"

    @property
    def shared(self) -> Path:
        return self.path / "shared.json"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def winner(self) -> Path:
        """The run spec that makes the winner again."""
        return self.path / "winner.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def study(self) -> Path:
        """Optuna's journal."""
        return self.path / "study.log"

    @property
    def population(self) -> Path:
        """The members of the generation under way, of population-based training."""
        return self.path / "population.json"

    def read_spec(self) -> SweepSpec:
        return SweepSpec.model_validate(read_json(self.spec))

    def read_shared(self) -> Shared:
        return Shared.model_validate(read_json(self.shared))

    def run_of(self, workspace: Workspace, trial: str) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(workspace.runs / f"{self.id}-{trial}")

    def start(self, trial: str, note: dict[str, Any]) -> int:
        """Note that a trial is being worked on; which attempt at the same this is."""
        before = self.started(trial) or {}
        attempts = 1 + (before["attempts"] if {**note, "attempts": before.get("attempts")} == before else 0)
        write_json(self.trials / f"{trial}.started.json", {**note, "attempts": attempts})
        return attempts

    def started(self, trial: str) -> dict[str, Any] | None:
        """What start() noted last; None when the trial was never begun."""
        file = self.trials / f"{trial}.started.json"
        return dict(read_json(file)) if file.is_file() else None

    def note(self, trial: Trial, timings: dict[str, float]) -> None:
        """Keep what a trial came to at a rung."""
        write_json(self._noted(trial.name), trial.model_dump(mode="json") | {"timings": timings})

    def noted(self, trial: str) -> tuple[Trial, dict[str, float]] | None:
        """What note() kept last; None where the trial has come to no rung's end."""
        if not self._noted(trial).is_file():
            return None
        told = read_json(self._noted(trial))
        return Trial.model_validate({key: value for key, value in told.items() if key != "timings"}), told["timings"]

    def under_way(self) -> Iterator[Trial]:
        """Trials that have come to a rung's end and have not ended, as they were noted last."""
        for file in sorted(self.trials.glob("*.rungs.json")):
            name = file.name.removesuffix(".rungs.json")
            noted = self.noted(name) if self.read(name) is None else None
            if noted:
                yield noted[0]

    def noted_curve(self, trial: str) -> dict[int, float | None]:
        """The scores of a trial at the rungs that it has come to, its record among them."""
        record, noted = self.read(trial), self.noted(trial)
        known = record.trial if record else noted[0] if noted else None
        return {seen.rung: seen.score for seen in known.curve} if known else {}

    def _noted(self, trial: str) -> Path:
        return self.trials / f"{trial}.rungs.json"

    def write(self, record: Record) -> None:
        """Put a trial's record where it survives whatever comes."""
        write_json(self.trials / f"{record.trial.name}.json", record.model_dump(mode="json"))

    def read(self, trial: str) -> Record | None:
        """A trial that has ended; None when it has not."""
        file = self.trials / f"{trial}.json"
        return Record.model_validate(read_json(file)) if file.is_file() else None

    def records(self) -> Iterator[Record]:
        """All trials that have ended, by name."""
        for file in sorted(self.trials.glob("*.json")):
            if not file.name.endswith((".started.json", ".rungs.json")):
                yield Record.model_validate(read_json(file))


def new_folder(workspace: Workspace, name: str) -> SweepFolder:
    """A new sweep's folder.

    Raises:
        TenureError: there is a sweep of that name.
    """
    path = workspace.root / "sweeps" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        what = f"there is a sweep '{name}' already"
        raise fail(what, str(path), f"give another name, or go on with it: tenure sweep --resume {name}") from None
    folder = SweepFolder(path)
    folder.trials.mkdir()
    return folder


def find_sweep(workspace: Workspace, name: str) -> SweepFolder:
    """The folder of a sweep that was started.

    Raises:
        TenureError: there is none of that name; names the nearest.
    """
    root = workspace.root / "sweeps"
    known = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if name in known:
        return SweepFolder(root / name)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    instead = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
    raise fail(f"there is no sweep '{name}' in {workspace.root}", "", instead)
