"""Checkpoints written while training goes on hold what they would have held had it waited."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, JobValues, run_of, start_job, train_here, weights
from pydantic import ValidationError
from safetensors.torch import load_file

from training import checkpoint
from training.checkpoint import find_damage, latest_checkpoint, remove_old
from training.spec import Training
from training.workspace import read_json, write_json

OFTEN: dict[str, Any] = STEPS | {"max_steps": 6, "epochs": 1, "checkpoint_every_steps": 2, "keep_checkpoints": 9}
BEHIND = OFTEN | {"checkpoint_in_background": True}


@pytest.fixture(scope="module")
def waited(one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobValues:
    job = start_job(tmp_path_factory.mktemp("waited"), tiny_model, zero=1, training=OFTEN)
    train_here(job)
    return job


@pytest.fixture
def job(one_process: None, tiny_model: Path, tmp_path: Path) -> JobValues:
    return start_job(tmp_path, tiny_model, zero=1, training=BEHIND)


def shards_of(job: JobValues, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_of(job).checkpoints / f"step-{step:07d}" / "shards-00000.safetensors")


def assert_same(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_what_is_written_late_is_the_state_of_its_own_step(
    job: JobValues, waited: JobValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write is held up until two more steps are done, the next save is due and waits for it."""
    real, publish = checkpoint._write_shards, checkpoint.publish
    steps_done: list[int] = []
    published: list[str] = []
    go_on = threading.Event()

    def late(file: Path, snapshot: Any) -> None:
        assert go_on.wait(60)
        real(file, snapshot)

    def telling(part: Path, final: Path, about: dict[str, Any]) -> None:
        published.append(f"{final.name} at {len(steps_done)}")
        publish(part, final, about)

    from training.worker import Trainer

    step = Trainer.train_step

    def counted(trainer: Trainer) -> None:
        step(trainer)
        steps_done.append(trainer.step)
        if trainer.step == 4:
            go_on.set()

    monkeypatch.setattr(checkpoint, "_write_shards", late)
    monkeypatch.setattr(checkpoint, "publish", telling)
    monkeypatch.setattr(Trainer, "train_step", counted)
    train_here(job)
    assert published[0] == "step-0000002 at 4", "two steps were made meanwhile"
    for saved in (2, 4, 6):
        assert find_damage(run_of(job).checkpoints / f"step-{saved:07d}") is None
        assert_same(shards_of(job, saved), shards_of(waited, saved))
    assert_same(weights(job), weights(waited))


def test_a_fault_in_the_background_ends_the_run_and_keeps_the_checkpoint_before(
    job: JobValues, waited: JobValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint._write_shards

    def second_fails(file: Path, snapshot: Any) -> None:
        if "0000004" in str(file):
            raise OSError(errno.ENOSPC, "no space left on device", str(file))
        real(file, snapshot)

    monkeypatch.setattr(checkpoint, "_write_shards", second_fails)
    with pytest.raises(OSError, match="no space left"):
        train_here(job)
    newest = latest_checkpoint(run_of(job).checkpoints)
    assert newest is not None
    assert newest.name == "step-0000002"
    monkeypatch.setattr(checkpoint, "_write_shards", real)
    train_here(job)
    assert_same(weights(job), weights(waited))


def test_a_save_that_fails_for_a_while_is_published_once(waited: JobValues, tmp_path: Path) -> None:
    """Storage that fails between manifest and rename, and between rename and the end."""
    part, final = tmp_path / ".step-0000002.part", tmp_path / "step-0000002"
    shutil.copytree(run_of(waited).checkpoints / "step-0000002", part)
    manifest = read_json(part / "manifest.json")
    (part / "manifest.json").unlink()
    write_json(part / "written-00000.json", manifest["files"])
    about = {name: value for name, value in manifest.items() if name != "files"}
    real = Path.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
        with pytest.raises(OSError, match="gone"):
            checkpoint.publish(part, final, about)
    assert Path.rename is real
    checkpoint.publish(part, final, about)
    checkpoint.publish(part, final, about)
    assert read_json(final / "manifest.json") == manifest
    assert find_damage(final) is None
    assert sorted(file.name for file in final.iterdir()) == sorted([*manifest["files"], "manifest.json"])


@pytest.mark.parametrize(
    ("last", "best", "stay"), [(1, 0, [6]), (2, 0, [5, 6]), (1, 1, [2, 6]), (1, 2, [2, 4, 6]), (1, 9, [1, 2, 3, 4, 6])]
)
def test_the_last_and_the_best_stay(waited: JobValues, tmp_path: Path, last: int, best: int, stay: list[int]) -> None:
    """A checkpoint without a validation of its own is none of the best."""
    losses = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.2, 5: None, 6: 0.5}
    for step, loss in losses.items():
        folder = tmp_path / f"step-{step:07d}"
        shutil.copytree(run_of(waited).checkpoints / "step-0000002", folder)
        write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "validation_loss": loss})
    remove_old(tmp_path, last, best)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{step:07d}" for step in stay]


def test_a_manifest_tells_the_validation_loss_of_its_step(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    training = OFTEN | {"validate_every_steps": 2, "keep_best_checkpoints": 1, "keep_checkpoints": 1}
    job = start_job(tmp_path, tiny_model, zero=0, training=training)
    train_here(job)
    from jobs import rows_of

    told = {row["step"]: row["loss"] for row in rows_of(run_of(job)) if row.get("suite") == "sums"}
    kept = {
        int(path.name[5:]): read_json(path / "manifest.json")["validation_loss"]
        for path in run_of(job).checkpoints.iterdir()
    }
    best = min((loss, step) for step, loss in told.items() if step)[1]
    assert kept == {step: told[step] for step in {best, 6}}


def test_best_checkpoints_want_a_validation_at_their_step() -> None:
    for keys in ({"validation_items": 0}, {"validate_every_steps": 2, "checkpoint_every_steps": 3}):
        with pytest.raises(ValidationError, match="best checkpoints"):
            Training(learning_rate=1.0, keep_best_checkpoints=1, **keys)
