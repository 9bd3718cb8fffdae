"""The folder that holds runs, caches and the tracking store, and the layout of one run's folder."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import fail

WORKSPACE_VARIABLE = "TENURE_WORKSPACE"
EVALUATIONS = "evals"  # the folder of what was scored without being trained
MERGED_FOLDER = "merged"  # in an artifact: base and adapter as one model
LINEAGE_FILE = "tenure.json"  # in an artifact: its run, and what that was tuned from


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; everything in it is readable without Tenure."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def spec_yaml(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        return self.path / "artifact"

    @property
    def tuned(self) -> Path:
        """What training alone gave, where the artifact is interpolated between it and the base."""
        return self.path / "tuned"

    @property
    def wise(self) -> Path:
        """Artifacts between base and tuned, by alpha."""
        return self.path / "wise"

    @property
    def wise_curve(self) -> Path:
        """The scores of every alpha."""
        return self.path / "wise.json"

    @property
    def scorecard(self) -> Path:
        return self.path / "scorecard.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def lineage(self) -> Path:
        return self.path / "lineage.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def examples(self) -> Path:
        return self.logs / "examples"

    @property
    def notice(self) -> Path:
        """Whoever makes this file asks a run to write a checkpoint after its step, and to leave."""
        return self.path / "leave"

    @property
    def events(self) -> Path:
        """What happened to the run, a line each: attempts, failures, changes of its workers, its end."""
        return self.path / "events.jsonl"

    @property
    def registration(self) -> Path:
        """Written last of all: a run that has it is finished."""
        return self.path / "registered.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working on this run; the lock goes with the process, however it ends.

        Raises:
            TenureError: another process holds it.
        """
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"another process is working on run '{self.id}'"
                raise fail(what, str(self.path), "wait for it, or stop it first") from None
            yield


@dataclass(frozen=True)
class Workspace:
    """Runs, caches and the tracking store under one root."""

    root: Path

    @classmethod
    def at(cls, root: str | Path | None = None) -> Workspace:
        """The workspace at a path, or at $TENURE_WORKSPACE, or ./workspace.

        Raises:
            TenureError: a file stands there.
        """
        chosen = root or os.environ.get(WORKSPACE_VARIABLE) or "workspace"
        path = Path(chosen).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise fail(f"{path} is no folder", "--workspace", "give a folder; it is made when it is not there")
        return cls(path)

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def tracking_uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    def new_run(self, name: str) -> RunFolder:
        """A fresh folder NAME-N, N one above the highest taken; made atomically, so two runs never share one."""
        self.runs.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path.name, name) for path in self.runs.iterdir()), default=0)
        while True:
            path = self.runs / f"{name}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return RunFolder(path)

    def claim_run(self, run_id: str) -> RunFolder:
        """The folder of a run whose id is given; one that was made and never begun is taken over.

        Raises:
            TenureError: the id is taken.
        """
        run = RunFolder(self.runs / run_id)
        if run.spec.is_file():
            raise fail(f"the id '{run_id}' is taken", str(run.path), f"give another, or: tenure resume {run_id}")
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def run(self, run_id: str) -> RunFolder:
        """The folder of a run.

        Raises:
            TenureError: there is no such run; names the nearest.
        """
        known = sorted(path.name for path in self.runs.iterdir()) if self.runs.is_dir() else []
        if run_id in known:
            return RunFolder(self.runs / run_id)
        close = difflib.get_close_matches(run_id, known, n=1, cutoff=0.5)
        instead = f"did you mean '{close[0]}'?" if close else "tenure runs lists the runs there are"
        raise fail(f"there is no run '{run_id}' in {self.root}", "", instead)

    def scored(self, name: str) -> RunFolder:
        """The folder of what has a scorecard: a run by its id, or an evaluation by `evals/ID`.

        Raises:
            TenureError: there is none.
        """
        if not name.startswith(f"{EVALUATIONS}/"):
            return self.run(name)
        folder = RunFolder(self.root / name)
        if not folder.scorecard.is_file():
            raise fail(
                f"there is no evaluation '{name}' in {self.root}", "", "tenure eval prints where its scorecard is"
            )
        return folder


def _number(folder: str, name: str) -> int:
    head, _, tail = folder.rpartition("-")
    return int(tail) if head == name and tail.isdigit() else 0


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
