"""Interrupted runs go on from their last whole checkpoint and end where uninterrupted ones do."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import Command, last_step
from conftest import WholeRun
from jobs import LONG, STEPS, JobValues, artifact_weights, rows_of, run_of, start_job, train_here, write_spec

from training.checkpoint import find_damage, latest_checkpoint
from training.data.seen import read_seen
from training.errors import TenureError
from training.job import Job
from training.worker import Trainer
from training.workspace import RunFolder


@pytest.fixture(scope="module")
def resumed_run(kept_run: WholeRun) -> WholeRun:
    """The same spec killed at a random step, its newest checkpoint damaged, and resumed."""
    workspace = kept_run.workspace
    run = RunFolder(workspace.runs / "tiny-2")
    killed = Command.start("train", kept_run.spec, workspace=workspace.root)
    killed.kill_a_worker_at(random.Random(1).randrange(5, 30), run)
    assert killed.finish() == 2, killed.err
    (run.path / "killed.txt").write_text(killed.out + killed.err, encoding="utf-8")
    damage(run)
    command = Command.start("resume", run.id, workspace=workspace.root)
    return WholeRun(command, command.finish(), workspace, run, kept_run.spec)


def damage(run: RunFolder) -> None:
    """Truncate a file of the newest checkpoint, leave a half-written one, and tear the last row of the metrics."""
    newest = latest_checkpoint(run.checkpoints)
    assert newest is not None
    (run.path / "damaged.txt").write_text(newest.name, encoding="utf-8")
    largest = max(newest.rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    with largest.open("rb+") as stream:
        stream.truncate(largest.stat().st_size // 2)
    shutil.copytree(newest, run.checkpoints / ".step-0000059.part")
    with run.metrics.open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "step", "st')


def assert_same_artifact(run: RunFolder, other: RunFolder) -> None:
    given, wanted = artifact_weights(run.artifact), artifact_weights(other.artifact)
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def assert_no_step_is_missing(run: RunFolder) -> None:
    """Every step is logged, and after the resume each follows the one before."""
    steps = [row["step"] for row in rows_of(run) if row["kind"] == "step"]
    assert sorted(set(steps)) == list(range(1, 61))
    (resume,) = [row["step"] for row in rows_of(run) if row["kind"] == "resume"]
    assert steps[-(60 - resume) :] == list(range(resume + 1, 61))


def test_a_killed_worker_is_one_error_without_a_traceback(resumed_run: WholeRun) -> None:
    told = (resumed_run.run.path / "killed.txt").read_text(encoding="utf-8")
    assert told.count("error:") == 1
    assert "a worker failed" in told
    assert "tenure resume tiny-2" in told
    assert "Traceback" not in told


def test_resumed_equals_uninterrupted_bit_for_bit(kept_run: WholeRun, resumed_run: WholeRun) -> None:
    assert (kept_run.status, resumed_run.status) == (0, 0), resumed_run.command.err
    assert_same_artifact(resumed_run.run, kept_run.run)
    assert_no_step_is_missing(resumed_run.run)
    wanted = {row["step"]: row["loss"] for row in rows_of(kept_run.run) if row["kind"] == "step"}
    given = {row["step"]: row["loss"] for row in rows_of(resumed_run.run) if row["kind"] == "step"}
    assert given == wanted


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(resumed_run: WholeRun) -> None:
    damaged = (resumed_run.run.path / "damaged.txt").read_text(encoding="utf-8")
    (resume,) = [row["step"] for row in rows_of(resumed_run.run) if row["kind"] == "resume"]
    assert resume == int(damaged.removeprefix("step-")) - 1
    log = (resumed_run.run.logs / "worker-0.log").read_text(encoding="utf-8")
    assert "passing over checkpoint" in log
    assert damaged in log


def test_ray_restarts_workers_within_the_budget(kept_run: WholeRun, broken_run: WholeRun) -> None:
    (resume,) = [row["step"] for row in rows_of(broken_run.run) if row["kind"] == "resume"]
    assert resume % 3 == 0
    assert_same_artifact(broken_run.run, kept_run.run)
    assert_no_step_is_missing(broken_run.run)


def test_a_run_outlives_its_driver_and_its_ray(kept_run: WholeRun) -> None:
    """SIGKILL for the driver, of which no process is left; then for the raylet, which ends Ray's workers when it likes.

    Where Ray ends the driver before that can tell why, its status is 1.
    """
    run, root = RunFolder(kept_run.workspace.runs / "outlives"), kept_run.workspace.root
    first = Command.start("train", kept_run.spec, "--id", run.id, workspace=root)
    first.wait_for(10, run)
    first.process.kill()
    assert first.finish() == -signal.SIGKILL
    expect_nobody(first)
    assert not run.artifact.is_dir()
    second = Command.start("resume", run.id, workspace=root)
    second.wait_for(last_step(run) + 5, run)
    (raylet,) = [process for process in second.survivors() if process.cmdline()[0].endswith("/raylet")]
    raylet.kill()
    assert second.finish() in (1, 2), second.err
    assert "Traceback" not in second.err
    expect_nobody(second)
    third = Command.start("resume", run.id, workspace=root)
    assert third.finish() == 0, third.err
    assert_same_artifact(run, kept_run.run)
    assert not any(find_damage(path) for path in run.checkpoints.glob("step-*"))


def expect_nobody(command: Command, patience_s: float = 30.0) -> None:
    """No process of a command is there any more, soon after it ended."""
    deadline = time.monotonic() + patience_s
    while left := command.survivors():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_every_example_is_seen_once_an_epoch_across_a_change_of_world_size(tiny_model: Path, tmp_path: Path) -> None:
    """By what the workers themselves wrote down: two, killed at a random step, then one at another ZeRO stage."""
    training = LONG | {"epochs": 2, "max_steps": None, "validate_every_steps": 0, "log_examples": True}
    spec = write_spec(tmp_path, tiny_model, training=training, scaling={"workers": 2, "zero_stage": 3})
    workspace = tmp_path / "workspace"
    run = RunFolder(workspace / "runs" / "tiny-1")
    killed = Command.start("train", spec, workspace=workspace)
    killed.kill_a_worker_at(random.Random(7).randrange(2, 10), run)
    assert killed.finish() == 2, killed.err
    again = Command.start("resume", run.id, "--workers", "1", "--zero-stage", "1", workspace=workspace)
    assert again.finish() in (0, 3), again.err
    (resume,) = [row["step"] for row in rows_of(run) if row["kind"] == "resume"]
    assert 0 < resume < 12
    seen = read_seen(run.examples)
    assert sorted(seen) == list(range(1, 13))
    for first in (1, 7):
        epoch = [example for step in range(first, first + 6) for example in seen[step]]
        assert sorted(epoch) == list(range(45))
    assert seen[1] != seen[7], "an order of its own in every epoch"


@pytest.fixture(scope="module")
def checkpointed(one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobValues:
    """A job of one process that ended, with its last two checkpoints (steps 18 and 20)."""
    job = start_job(
        tmp_path_factory.mktemp("checkpointed"), tiny_model, zero=1, training=STEPS | {"checkpoint_every_steps": 3}
    )
    train_here(job)
    return job


def test_a_worker_refuses_a_checkpoint_of_another_spec(checkpointed: JobValues) -> None:
    with pytest.raises(TenureError, match="another run's spec"):
        Trainer.start(Job(**{**checkpointed, "spec_hash": "another"}), run_of(checkpointed))


def test_only_whole_checkpoints_are_found(checkpointed: JobValues, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run_of(checkpointed).checkpoints, folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["step-0000018", "step-0000020"]
    (folder / "step-0000020").rename(folder / ".step-0000020.part")
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.name == "step-0000018"
    (found / "manifest.json").unlink()
    assert find_damage(found) == "it has no manifest"
    assert latest_checkpoint(folder) is None


def test_a_finished_run_goes_on_at_its_end(checkpointed: JobValues) -> None:
    trainer = Trainer.start(Job(**checkpointed), run_of(checkpointed))
    assert trainer.step == 20 == last_step(run_of(checkpointed))
