"""The folder of a task sequence: its spec, which run learned which task, and what came of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from training.errors import fail
from training.sequences.spec import SequenceSpec
from training.workspace import RunFolder, Workspace, read_json, write_json


@dataclass(frozen=True)
class SequenceFolder:
    """Paths of one sequence; its runs lie among all others."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        return self.path / "sequence.json"

    @property
    def spec_yaml(self) -> Path:
        """The file as it was given."""
        return self.path / "sequence.yaml"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        return self.path / "driver.log"

    def step_yaml(self, task: str) -> Path:
        """The spec of a task's run as a file of its own."""
        return self.path / "steps" / f"{task}.yaml"

    @property
    def _steps(self) -> Path:
        return self.path / "steps.json"

    def runs(self) -> dict[str, str]:
        """The id of the run of every task that has been started, in order."""
        return dict(read_json(self._steps)) if self._steps.is_file() else {}

    def note_run(self, task: str, run: RunFolder) -> None:
        """Remember which run learns a task."""
        write_json(self._steps, {**self.runs(), task: run.id})

    def read_spec(self) -> SequenceSpec:
        """The sequence as it was read when it was started."""
        return SequenceSpec.model_validate(read_json(self.spec))


def claim_sequence(workspace: Workspace, sequence_id: str) -> SequenceFolder:
    """The folder of a sequence whose id is given; one that was made and never begun is taken over.

    Raises:
        TenureError: the id is taken.
    """
    folder = SequenceFolder(_root(workspace) / sequence_id)
    if folder.spec.is_file():
        raise fail(f"the id '{sequence_id}' is taken", str(folder.path), "give another, or go on: tenure resume ID")
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def new_sequence(workspace: Workspace, name: str) -> SequenceFolder:
    """A fresh folder NAME-N, N above those of all sequences and runs of that name, so that an id names one of both."""
    folder = _root(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    taken = {path.name for root in (folder, workspace.runs) if root.is_dir() for path in root.iterdir()}
    number = 1
    while True:
        path = folder / f"{name}-{number}"
        number += 1
        if path.name in taken:
            continue
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return SequenceFolder(path)


def is_sequence_id(workspace: Workspace, name: str) -> bool:
    """Whether a name is that of a sequence, and of no run."""
    return "/" not in name and (_root(workspace) / name).is_dir() and not (workspace.runs / name).is_dir()


def find_sequence(workspace: Workspace, name: str) -> SequenceFolder:
    """The folder of a sequence.

    Raises:
        TenureError: there is no such one, or it never started; names the nearest.
    """
    root = _root(workspace)
    known = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        instead = f"did you mean '{close[0]}'?" if close else "start one with: tenure sequence SPEC"
        raise fail(f"there is no sequence '{name}' in {workspace.root}", "", instead)
    folder = SequenceFolder(root / name)
    if not folder.spec.is_file():
        raise fail(f"sequence '{name}' never started", str(folder.path), "start its spec again: tenure sequence SPEC")
    return folder


def _root(workspace: Workspace) -> Path:
    return workspace.root / "sequences"
