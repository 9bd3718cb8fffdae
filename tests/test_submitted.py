"""Runs submitted to a Ray cluster of one machine: two that each want all of it, one stopped and resumed, one scored."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import MARK, last_step
from jobs import LONG, TWO_WORKERS, rows_of, write_spec
from probing import free_port
from test_resume import assert_same_artifact

from cluster import submit
from cluster.jobs import Job, follow, job_of, list_jobs, resume, stop
from training.copies import restore_run
from training.errors import TenureError
from training.evaluation.scorecard import read_scorecard
from training.waiting import WAITING
from training.workspace import RunFolder, Workspace

WAIT_S = 600.0
_PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
_PATIENT = {"RAY_raylet_start_wait_time_s": "120"}  # on a machine where others work too


@dataclass(frozen=True)
class Head:
    """A cluster of two processors, the folder that its nodes see, and a spec that wants both of them."""

    address: str
    workspace: Path
    spec: Path

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(self.workspace / "runs" / run_id)

    def submit(self, run_id: str, command: str = "train", of: str | None = None) -> None:
        place = str(self.workspace)
        submit(command, self.spec, address=self.address, workspace=place, run_id=run_id, of=of)  # type: ignore[arg-type]

    def end_of(self, run_id: str) -> Job:
        """How a job stands when it has ended by itself."""
        said: list[str] = []
        job = follow(run_id, self.address, said.append)
        assert job.state == "SUCCEEDED", "".join(said)
        return job


@pytest.fixture(scope="module")
def head(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("submitted")
    steps = LONG | {"epochs": 40, "max_steps": 200, "checkpoint_every_steps": 5, "validate_every_steps": 0}
    promise = {"contract": {"min_gain": 0.0, "max_loss": 100.0}}
    scaling = TWO_WORKERS | {"copy_to": (folder / "store").as_uri()}
    spec = write_spec(folder, tiny_model, training=steps, scaling=scaling, amend=promise)
    with ray_head(folder) as address:
        yield Head(address, folder / "workspace", spec)


@contextmanager
def ray_head(folder: Path) -> Iterator[str]:
    """A cluster with a dashboard, whose address it gives; it ends with all its processes."""
    mark, ports = uuid.uuid4().hex, {name: free_port() for name in _PORTS}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory(prefix="tn", dir="/tmp", ignore_cleanup_errors=True) as session:
        sizes = ["--num-cpus=2", f"--object-store-memory={80 * 2**20}", f"--temp-dir={session}"]
        command = ["start", "--head", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *sizes]
        try:
            started = subprocess.run(
                [str(Path(sys.executable).with_name("ray")), *command, *(f"--{name}={ports[name]}" for name in _PORTS)],
                env={**kept, MARK: mark, "PATH": path, "RAY_AUTH_MODE": "disabled", **_PATIENT},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=WAIT_S,
            )
            assert started.returncode == 0, started.stderr
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
        finally:
            end_all(mark)


def end_all(mark: str) -> None:
    """End the processes that carry the mark."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                process.kill()
        except (psutil.Error, OSError):
            continue


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def steps_of(run: RunFolder) -> int:
    return last_step(run) if run.metrics.is_file() else 0


@pytest.fixture(scope="module")
def waiting(head: Head) -> str:
    """Which of two runs waits, of those that were submitted together and each want the whole cluster; both go on."""
    for run_id in ("one", "two"):
        head.submit(run_id)
    until(lambda: waiting_one(head) is not None, "one waits while the other trains")
    late = waiting_one(head)
    assert late is not None
    assert job_of(late, head.address).told.startswith(f"{WAITING}: 2 processes of 1 CPU")
    return late


def waiting_one(head: Head) -> str | None:
    """The run that waits while the other one makes steps."""
    for job in list_jobs(head.address):
        if job.waits and steps_of(head.run({"one": "two", "two": "one"}[job.id])) > 0:
            return job.id
    return None


def test_of_two_runs_that_want_all_one_waits_aloud_and_both_end(head: Head, waiting: str) -> None:
    first = {"one": "two", "two": "one"}[waiting]
    until(lambda: steps_of(head.run(waiting)) >= 10, "the other trains")
    assert stop(waiting, head.address).state in ("STOPPED", "FAILED")
    assert not head.run(waiting).artifact.is_dir(), "it was stopped on its way"
    head.end_of(first)
    resume(waiting, address=head.address)
    head.end_of(waiting)
    (resumed,) = [row["step"] for row in rows_of(head.run(waiting)) if row["kind"] == "resume"]
    assert resumed >= 5
    assert_same_artifact(head.run(waiting), head.run(first))


def test_a_submitted_evaluation_scores_a_run_as_the_run_was_scored(head: Head, waiting: str) -> None:
    head.submit("again", "eval", of="one")
    assert head.end_of("again").command == "eval"
    wanted = read_scorecard(head.run("one").scorecard)
    found = read_scorecard(head.workspace / "evals" / "again" / "scorecard.json")
    assert (found.suites, found.artifact_hash) == (wanted.suites, wanted.artifact_hash)
    assert found.contract == wanted.contract


def test_a_finished_run_stands_in_its_store_too(head: Head, waiting: str, tmp_path: Path) -> None:
    store = head.spec.parent / "store"
    back = restore_run((store / waiting).as_uri(), Workspace.at(tmp_path / "elsewhere"))
    assert_same_artifact(back, head.run(waiting))
    assert read_scorecard(back.scorecard) == read_scorecard(head.run(waiting).scorecard)
    assert (back.report.is_file(), back.registration.is_file()) == (True, True)
    assert (tmp_path / "elsewhere" / "jobs" / waiting / "job.json").is_file()


def test_a_new_head_that_knows_nothing_of_a_run_takes_it_up(head: Head, waiting: str) -> None:
    """By what lies in the workspace alone; of a run that is finished there is nothing left to do."""
    with ray_head(head.spec.parent) as address:
        assert list_jobs(address) == []
        with pytest.raises(TenureError, match="the cluster knows no job 'one'"):
            resume("one", address=address)
        resume("one", address=address, workspace=str(head.workspace))
        said: list[str] = []
        assert follow("one", address, said.append).exit_status == 0, said
    assert "run one is finished" in "".join(said)
