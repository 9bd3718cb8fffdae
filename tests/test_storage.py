"""Checkpoints on storage that fails: for a while, for good, or in the middle of a write; and runs asked to leave."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, JobValues, rows_of, run_of, start_job, train_here, weights
from safetensors import SafetensorError

from training import checkpoint, storage
from training.checkpoint import find_damage, latest_checkpoint
from training.errors import TenureError
from training.faults import explained_at
from training.storage import patiently

SHORT = STEPS | {"max_steps": 6, "epochs": 1, "checkpoint_every_steps": 2}


def failing(*numbers: int | None) -> Any:
    """An action that fails with these numbers of faults, one a call, and succeeds where there is None, or none left."""
    left = list(numbers)

    def act() -> str:
        number = left.pop(0) if left else None
        if number is not None:
            raise OSError(number, "failed")
        return "done"

    return act


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which are not waited for."""
    waited: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    return waited


def test_a_fault_that_passes_is_waited_for(waits: list[float]) -> None:
    assert patiently(failing(errno.EIO, errno.ESTALE), "writing") == "done"
    assert waits == [1, 4]


def test_a_fault_that_stays_is_told_after_the_last_wait(waits: list[float]) -> None:
    with pytest.raises(OSError, match="failed"):
        patiently(failing(*[errno.ETIMEDOUT] * 9), "writing")
    assert waits == [1, 4, 16]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_closed_disk_is_not_waited_for(waits: list[float], number: int) -> None:
    with pytest.raises(OSError, match="failed"):
        patiently(failing(number), "writing")
    assert waits == []


def test_safetensors_tells_its_faults_in_words() -> None:
    assert storage.error_number(SafetensorError("Error: I/O error: Input/output error (os error 5)")) == errno.EIO
    assert storage.error_number(SafetensorError("Error: header too large")) is None


@pytest.fixture(scope="module")
def undisturbed(one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobValues:
    """Six steps with a checkpoint after every second."""
    job = start_job(tmp_path_factory.mktemp("undisturbed"), tiny_model, zero=1, training=SHORT)
    train_here(job)
    return job


@pytest.fixture
def job(one_process: None, tiny_model: Path, tmp_path: Path) -> JobValues:
    return start_job(tmp_path, tiny_model, zero=1, training=SHORT)


def assert_same_weights(job: JobValues, wanted: JobValues) -> None:
    given, expected = weights(job), weights(wanted)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_storage_that_fails_every_third_call_loses_nothing(
    job: JobValues, undisturbed: JobValues, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    for name in ("_write_shards", "_write_random_state", "publish"):
        real = getattr(checkpoint, name)

        def sometimes(*arguments: Any, real: Any = real) -> None:
            nonlocal calls
            calls += 1
            real(*arguments)
            if calls % 3 == 0:
                raise OSError(errno.EIO, "the share is gone")

        monkeypatch.setattr(checkpoint, name, sometimes)
    train_here(job)
    assert len(waits) == calls // 3 > 2
    folder = run_of(job).checkpoints
    assert [path.name for path in sorted(folder.iterdir())] == ["step-0000004", "step-0000006"]
    assert [find_damage(path) for path in folder.iterdir()] == [None, None]
    assert_same_weights(job, undisturbed)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    job: JobValues, undisturbed: JobValues, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, snapshot: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left on device", str(file))

    def fill_up_after(file: Path, snapshot: Any) -> None:
        real(file, snapshot)
        monkeypatch.setattr(checkpoint, "_write_shards", full)

    real = checkpoint._write_shards
    monkeypatch.setattr(checkpoint, "_write_shards", fill_up_after)
    folder = run_of(job)
    with pytest.raises(TenureError, match="no space is left"), explained_at(folder.logs):
        train_here(job)
    assert waits == []
    newest = latest_checkpoint(folder.checkpoints)
    assert newest is not None
    assert newest.name == "step-0000002"
    monkeypatch.setattr(checkpoint, "_write_shards", real)
    train_here(job)
    assert list(folder.checkpoints.glob(".*")) == [], "the half-written one is gone"
    assert_same_weights(job, undisturbed)


def test_old_checkpoints_stay_while_the_newest_is_not_whole(tmp_path: Path, undisturbed: JobValues) -> None:
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(run_of(undisturbed).checkpoints, folder)
    shutil.copytree(folder / "step-0000006", folder / "step-0000008")
    torn = next((folder / "step-0000008").glob("shards-*"))
    torn.write_bytes(torn.read_bytes()[:10])
    checkpoint.remove_old(folder, keep=1)
    assert len(list(folder.iterdir())) == 3
    shutil.rmtree(folder / "step-0000008")
    checkpoint.remove_old(folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-0000006"]


def test_a_run_that_is_asked_to_leave_saves_its_step_and_ends_the_same_later(
    job: JobValues, undisturbed: JobValues
) -> None:
    run = run_of(job)
    run.notice.touch()
    trainer = train_here(job)
    assert (trainer.step, run.artifact.exists()) == (1, False)
    newest = latest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest.name == "step-0000001"
    run.notice.unlink()
    train_here(job)
    assert [row["step"] for row in rows_of(run) if row["kind"] in ("leave", "resume")] == [1, 1]
    assert [row["step"] for row in rows_of(run) if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(job, undisturbed)
