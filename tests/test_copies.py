"""A run's copy in object storage (a stand-in in memory), and the run that goes on from it."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from commands import last_step
from jobs import STEPS, JobValues, run_of, start_job, train_here, weights

from cluster.restoring import restore
from training.checkpoint import find_damage
from training.copies import Copy, copied, restore_run
from training.errors import TenureError
from training.events import read_events
from training.job import Job
from training.worker import Trainer
from training.workspace import RunFolder, Workspace, read_json, write_json

OFTEN: dict[str, Any] = STEPS | {"max_steps": 6, "epochs": 1, "checkpoint_every_steps": 2, "keep_checkpoints": 2}


@pytest.fixture
def store() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def trained(one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobValues:
    """A run of six steps, not disturbed."""
    job = start_job(tmp_path_factory.mktemp("trained"), tiny_model, zero=1, training=OFTEN)
    train_here(job)
    return job


def half_of(trained: JobValues, tmp_path: Path) -> RunFolder:
    """The run as it was after four steps: without the last checkpoint and the artifact."""
    run = RunFolder(tmp_path / "first" / "runs" / "tiny-1")
    shutil.copytree(run_of(trained).path, run.path)
    shutil.rmtree(run.artifact)
    shutil.rmtree(run.checkpoints / "step-0000006")
    for name in ("spec", "plan"):
        write_json(run.path / f"{name}.json", trained[name])
    write_json(run.lineage, {})
    write_json(tmp_path / "first" / "jobs" / "tiny-1" / "job.json", {"id": "tiny-1"})
    (run.path / "ray").mkdir()
    (run.path / "ray" / "state").write_text("x", encoding="utf-8")
    return run


def names_in(store: str) -> set[str]:
    filesystem, root = fsspec.core.url_to_fs(store)
    return {name.removeprefix(f"{root}/tiny-1/") for name in filesystem.find(root)}


def test_a_run_whose_disk_is_lost_goes_on_from_its_copy_to_the_same_weights(
    trained: JobValues, store: str, tmp_path: Path
) -> None:
    run = half_of(trained, tmp_path)
    Copy.of(run, store).update()
    assert not any(name.startswith("ray/") for name in names_in(store))
    shutil.rmtree(tmp_path / "first")
    workspace = Workspace.at(tmp_path / "second")
    back = restore(f"{store}/tiny-1", workspace)
    assert back.path == workspace.runs / "tiny-1"
    assert read_json(workspace.root / "jobs" / "tiny-1" / "job.json") == {"id": "tiny-1"}
    assert [path.name for path in back.checkpoints.iterdir()] == ["step-0000004"]
    job = {**trained, "run": str(back.path)}
    trainer = Trainer.start(Job(**job), back)
    assert trainer.step == 4
    trainer.run()
    given, wanted = weights(job), weights(trained)
    assert all(bool((given[name] == wanted[name]).all()) for name in wanted)
    assert last_step(back) == 6
    with pytest.raises(TenureError, match="has a run 'tiny-1'"):
        restore(f"{store}/tiny-1", workspace)


def test_a_damaged_checkpoint_of_a_copy_is_passed_over(trained: JobValues, store: str, tmp_path: Path) -> None:
    run = half_of(trained, tmp_path)
    shutil.copytree(run_of(trained).checkpoints / "step-0000006", run.checkpoints / "step-0000006")
    Copy.of(run, store).update()
    filesystem, root = fsspec.core.url_to_fs(store)
    filesystem.pipe_file(f"{root}/tiny-1/checkpoints/step-0000006/random-00000.pt", b"x")
    back = restore_run(f"{store}/tiny-1", Workspace.at(tmp_path / "second"))
    (kept,) = back.checkpoints.iterdir()
    assert (kept.name, find_damage(kept)) == ("step-0000004", None)


def test_old_checkpoints_go_when_the_newest_stands(trained: JobValues, store: str, tmp_path: Path) -> None:
    run = half_of(trained, tmp_path)
    copy = Copy.of(run, store)
    copy.update()
    assert {name.split("/")[1] for name in names_in(store) if "checkpoints/" in name} == {"step-0000004"}
    shutil.copytree(run_of(trained).checkpoints / "step-0000006", run.checkpoints / "step-0000006")
    shutil.rmtree(run.checkpoints / "step-0000004")
    copy.update()
    assert {name.split("/")[1] for name in names_in(store) if "checkpoints/" in name} == {"step-0000006"}


def test_what_was_half_copied_is_no_checkpoint(
    trained: JobValues, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails at every third file; each time on, a checkpoint without a manifest is never taken."""
    run = half_of(trained, tmp_path)
    copy = Copy.of(run, store)
    put, asked = copy.filesystem.put_file, iter(range(1000))

    def fails(here: str, there: str) -> None:
        if next(asked) % 3 == 2:
            raise OSError("the store is away")
        put(here, there)

    monkeypatch.setattr(copy.filesystem, "put_file", fails)
    failures = 0
    while True:
        try:
            copy.update()
            break
        except OSError:
            failures += 1
            found = {name for name in names_in(store) if name.startswith("checkpoints/")}
            whole = all((run.checkpoints.parent / name).is_file() for name in found)
            assert whole
            if any(name.endswith("manifest.json") for name in found):
                assert len(found) == len(list((run.checkpoints / "step-0000004").iterdir()))
    assert failures > 1
    monkeypatch.undo()
    back = restore_run(f"{store}/tiny-1", Workspace.at(tmp_path / "second"))
    assert find_damage(back.checkpoints / "step-0000004") is None


def test_a_copy_that_fails_is_told_and_ends_with_one_error(
    trained: JobValues, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = half_of(trained, tmp_path)
    monkeypatch.setattr(Copy, "update", lambda _: (_ for _ in ()).throw(PermissionError("no such key")))
    told: list[str] = []
    with pytest.raises(TenureError, match="copy is not complete: PermissionError: no such key"):  # noqa: SIM117
        with copied(run, store, told.append, every_s=60):
            pass
    assert "is not complete" in told[0]
    assert read_events(run)[-1]["event"] == "copy_failed"


def test_a_place_that_is_no_copy_is_told(tmp_path: Path, store: str) -> None:
    with pytest.raises(TenureError, match="there is no copy of a run"):
        restore_run(f"{store}/tiny-1", Workspace.at(tmp_path))
    with pytest.raises(TenureError, match="the store nowhere:// is unknown"):
        restore_run("nowhere://x/tiny-1", Workspace.at(tmp_path))
