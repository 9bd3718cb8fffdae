"""What a submitted job runs on the cluster: `python -m cluster.entry WORKSPACE ID [--verdicts-succeed]`.

The job's folder is first kept in the workspace, so that a run can be taken up again when the cluster that it was
submitted to is gone. Whatever was begun under the id is gone on with; nothing is done twice.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.packing import JOB_FILE
from training.errors import TenureError, fail
from training.workspace import Workspace, read_json

_PYTHONS = ((3, 11), (3, 12))
_RESTARTS = 3
_VERDICTS = (3, 4)
_WAIT_S = 5.0
# What ends a process that nobody asked to stop; SIGKILL is how a machine out of memory ends one.
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)


def main(root: str, run_id: str, *flags: str) -> int:
    """Keep the job's folder, then run its command until it ends by itself; the command's exit status.

    With --verdicts-succeed a run that was done and whose contract is broken, or left open, ends with 0: whoever starts
    failed jobs again has nothing to do then.
    """
    status = _until_it_ends(root, run_id)
    return 0 if "--verdicts-succeed" in flags and status in _VERDICTS else status


def _until_it_ends(root: str, run_id: str) -> int:
    _check_python()
    workspace = Workspace.at(root)
    folder = keep(Path.cwd(), workspace, run_id)
    for attempt in range(_RESTARTS + 1):
        arguments = command_line(folder, workspace, run_id)
        print(f"tenure {' '.join(arguments)}", flush=True)
        status = _run(arguments, folder, workspace)
        if -status not in _CRASHES or attempt == _RESTARTS:
            return status if status >= 0 else 128 - status
        wait_s = _WAIT_S * 2**attempt
        print(f"the driver was killed by signal {-status}; it starts again in {wait_s:.0f} s", flush=True)
        time.sleep(wait_s)
    raise AssertionError


def keep(given: Path, workspace: Workspace, run_id: str) -> Path:
    """The job's folder in the workspace: the one kept before, or a copy of the one given.

    Raises:
        TenureError: there is neither, or the id belongs to something else.
    """
    kept = workspace.root / "jobs" / run_id
    brought = (given / JOB_FILE).is_file() and given.resolve() != kept.resolve()
    if kept.is_dir():
        if brought and not same_job(given, kept):
            raise _taken(run_id, kept)
        return kept
    if not brought:
        raise fail(f"no job '{run_id}' was kept", str(kept), "submit it again")
    if _begun(workspace, read_json(given / JOB_FILE)["command"], run_id):
        raise _taken(run_id, workspace.root)
    part = kept.with_name(f".{run_id}.{os.getpid()}.part")
    shutil.copytree(given, part, ignore=shutil.ignore_patterns("__pycache__"))
    part.rename(kept)
    return kept


def same_job(one: Path, other: Path) -> bool:
    """Whether two jobs' folders hold the same command, spec and files; the code may differ."""
    names = [file.relative_to(one) for file in [one / JOB_FILE, *(one / "files").rglob("*")] if file.is_file()]
    others = [file.relative_to(other) for file in [other / JOB_FILE, *(other / "files").rglob("*")] if file.is_file()]
    return sorted(names) == sorted(others) and all(filecmp.cmp(one / name, other / name, False) for name in names)


def command_line(folder: Path, workspace: Workspace, run_id: str) -> list[str]:
    """The arguments of `tenure` that begin a job, or go on with it."""
    job = read_json(folder / JOB_FILE)
    command, subject = job["command"], job["subject"]
    spec, begun = str(folder / subject), _begun(workspace, command, run_id)
    ways = {
        "train": ["resume", run_id] if begun else ["train", spec, "--id", run_id],
        "sequence": ["resume", run_id] if begun else ["sequence", spec, "--id", run_id],
        "sweep": ["sweep", "--resume", run_id] if begun else ["sweep", spec],
        "eval": ["eval", spec, "--of", job.get("of", ""), "--id", run_id],
        "serve": ["serve", subject],
    }
    return ways[command] + _address()


def _begun(workspace: Workspace, command: str, run_id: str) -> bool:
    marks = {
        "train": workspace.runs / run_id / "spec.json",
        "sequence": workspace.root / "sequences" / run_id / "sequence.json",
        "sweep": workspace.root / "sweeps" / run_id / "sweep.json",
    }
    return command in marks and marks[command].is_file()


def _address() -> list[str]:
    """The Ray that the job runs in, which Ray names in its environment."""
    address = os.environ.get("RAY_ADDRESS")
    return ["--address", address] if address else []


def _run(arguments: list[str], folder: Path, workspace: Workspace) -> int:
    """The command in a process of its own, with the job's own code."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "cluster", "--workspace", str(workspace.root), *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _taken(run_id: str, where: Path) -> TenureError:
    return fail(f"the id '{run_id}' is taken by another run", str(where), "submit with another --id")


def _check_python() -> None:
    if sys.version_info[:2] not in _PYTHONS:
        version = ".".join(map(str, sys.version_info[:3]))
        raise fail(f"the cluster runs Python {version}", "", "give its nodes an image with Python 3.11 or 3.12")


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except TenureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
