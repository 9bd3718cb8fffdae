"""Whatever goes wrong in a worker comes back as one error with advice, and leaves a run that can be resumed."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import Command
from jobs import LONG, STEPS, plan_job, rows_of, run_of, start_job, write_spec
from safetensors import SafetensorError

from cluster.cli import main
from training.checkpoint import latest_checkpoint
from training.errors import TenureError, fail
from training.faults import explained_at
from training.job import Job, drop_torn_row
from training.worker import Trainer, train_worker
from training.workspace import RunFolder, Workspace

HAS_MOUNTS = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"], capture_output=True, check=False
    ).returncode
    == 0
)
# A disk of its own for the command, whose runs are kept once the command has ended and what filled it is gone.
ON_A_SMALL_DISK = """
disk=$1; kept=$2; shift 2
mount -t tmpfs -o size=320m tmpfs "$disk" || exit 99
"$@"
status=$?
rm -f "$disk/filler"
cp -r "$disk/workspace/runs" "$kept"
exit $status
"""


def test_a_diverged_loss_is_one_error(
    ray_cluster: None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spec = write_spec(tmp_path, tiny_model, training=STEPS | {"learning_rate": 1e30}, scaling={"workers": 2})
    arguments = ["tenure", "--workspace", str(tmp_path / "workspace"), "train", str(spec)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    told = "".join(capfd.readouterr())
    assert ended.value.code == 2
    assert told.count("error:") == 1
    assert "the loss is not a finite number at step" in told
    assert "lower training.learning_rate" in told
    assert "Traceback" not in told


@pytest.mark.skipif(not HAS_MOUNTS, reason="needs a mount namespace of its own (unshare -rm)")
def test_a_full_disk_is_one_error_and_costs_no_checkpoint(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    training = LONG | {"epochs": 100, "max_steps": 500}
    spec = write_spec(tmp_path, tiny_model, training=training, scaling={"workers": 1, "zero_stage": 1})
    under = ("unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(disk), str(kept))
    command = Command.start("train", spec, workspace=disk / "workspace", under=under)
    try:
        inside = Path(f"/proc/{command.process.pid}/root{disk}")
        command.wait_for(3, RunFolder(inside / "workspace/runs/tiny-1"))
        fill(inside / "filler")
        status = command.finish()
    finally:
        command.end()
    assert status == 2, command.err
    assert command.err.count("error:") == 1
    assert "no space is left on the disk" in command.err
    assert "tenure resume" in command.err
    assert "Traceback" not in command.out + command.err, command.out + command.err
    run = RunFolder(kept / "tiny-1")
    drop_torn_row(run.metrics)
    newest = latest_checkpoint(run.checkpoints)
    assert newest is not None
    job = plan_job(spec, Workspace.at(tmp_path / "again"))
    trainer = Trainer.start(Job(**{**job, "run": str(run.path)}), run)
    assert newest.name == f"step-{trainer.step:07d}"
    assert rows_of(run)[-1] == {"kind": "resume", "step": trainer.step}


def fill(filler: Path, seconds: float = 3.0) -> None:
    """Keep a disk full for some steps: a checkpoint that goes leaves no room for the next."""
    until = time.monotonic() + seconds
    with filler.open("wb", buffering=0) as stream:
        while time.monotonic() < until:
            try:
                stream.write(bytes(2**20))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(0.002)


@pytest.mark.parametrize(
    ("error", "what", "instead"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\n..."), "CUDA out of memory", "lower"),
        (MemoryError(), "out of memory", "micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory", "max_length"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: no space is left", "free some space"),
        (
            RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos"),
            "no space is left",
            "free",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left", "free some space"),
        (OSError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied", "see the worker's log"),
    ],
)
def test_faults_of_memory_and_disk_say_what_to_do(
    one_process: None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    what: str,
    instead: str,
) -> None:
    def raises(job: Job, folder: RunFolder) -> Trainer:
        raise error

    monkeypatch.setattr(Trainer, "start", raises)
    run = RunFolder(tmp_path / "run")
    with capfd.disabled(), pytest.raises(TenureError) as caught:
        train_worker({"spec": {}, "plan": {}, "prepared": "", "run": str(run.path), "spec_hash": "", "aids": {}})
    assert len(caught.value.problems) == 1
    assert what in str(caught.value)
    assert instead in str(caught.value)
    assert "Traceback" in (run.logs / "worker-0.log").read_text(encoding="utf-8")


def test_an_unknown_fault_stays_itself_and_its_traceback_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="surprise"), explained_at(tmp_path):
        raise KeyError("surprise")
    assert "Traceback" in capsys.readouterr().err


def test_a_users_error_is_passed_on_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TenureError, match="known"), explained_at(tmp_path):
        raise fail("known")
    assert capsys.readouterr().err == ""


def test_a_torn_row_is_dropped_and_whole_rows_stay(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    run = run_of(start_job(tmp_path, tiny_model))
    drop_torn_row(run.metrics)
    assert not run.metrics.exists()
    run.metrics.write_text('{"kind": "step", "step": 1}\n{"kind": "st', encoding="utf-8")
    drop_torn_row(run.metrics)
    assert run.metrics.read_text(encoding="utf-8") == '{"kind": "step", "step": 1}\n'
