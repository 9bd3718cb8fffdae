"""The command line in a process of its own, and what can be done to it meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from jobs import rows_of

from training.workspace import RunFolder

ROOT = Path(__file__).resolve().parents[1]
MARK = "TENURE_TEST_MARK"
WAIT_S = 600.0  # for what hangs: another process that tests may have the processors meanwhile


@dataclass
class Command:
    """`tenure` with its arguments; every process that comes of it carries the mark in its environment."""

    process: subprocess.Popen[str]
    mark: str
    out: str = field(default="")
    err: str = field(default="")

    @classmethod
    def start(cls, *arguments: str | Path, workspace: Path, under: tuple[str, ...] = ()) -> Command:
        """`under` is a command line that runs another one, such as a shell script that ends in "$@"."""
        mark = uuid.uuid4().hex
        path = ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "cluster", "--workspace", str(workspace), *map(str, arguments)],
            env={**os.environ, MARK: mark, "PYTHONPATH": path},
            cwd=workspace.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return cls(process, mark)

    def finish(self, wait_s: float = WAIT_S) -> int:
        """The exit status, once the command has ended."""
        try:
            self.out, self.err = self.process.communicate(timeout=wait_s)
        finally:
            self.end()
        return self.process.returncode

    def end(self) -> None:
        """End what is left of the command, should a test fail half-way."""
        if self.process.poll() is None:
            for process in self.survivors():
                process.kill()

    def survivors(self) -> list[psutil.Process]:
        """The processes alive that descend from the command."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def kill_a_worker(self) -> None:
        """SIGKILL one Ray Train worker."""
        workers = [process for process in self.survivors() if "RayTrainWorker" in _title(process)]
        assert workers, [_title(process) for process in self.survivors()]
        workers[-1].send_signal(signal.SIGKILL)

    def kill_a_worker_at(self, step: int, run: RunFolder) -> None:
        """SIGKILL one Ray Train worker once the run has logged a step."""
        self.wait_for(step, run)
        self.kill_a_worker()

    def wait_for(self, step: int, run: RunFolder) -> None:
        """Wait until the run has logged a step."""
        deadline = time.monotonic() + WAIT_S
        while not (run.metrics.is_file() and last_step(run) >= step):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.005)


def last_step(run: RunFolder) -> int:
    """The last step that a run has logged in whole."""
    return max((row["step"] for row in rows_of(run) if row["kind"] == "step"), default=0)


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
