"""The real command in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120
# Libraries read these while they are imported.
_FIXED = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

Done = subprocess.CompletedProcess[str]


def run_tenure(folder: Path, *arguments: str, workspace: Path | None = None, within: Sequence[str] = ()) -> Done:
    """`tenure ARGUMENTS` in a folder, in its workspace/ unless another is given, with the hub out of reach.

    `within` is a command that runs the rest of its arguments.
    """
    environment = {**os.environ, **_FIXED, "TENURE_WORKSPACE": str(workspace or folder / "workspace")}
    if not within:
        return _forked(folder, arguments, environment)
    command = [*within, sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def _forked(folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> Done:
    """The command as a fork of a process that has imported the libraries."""
    warm = _warm_process()
    assert warm.stdin
    assert warm.stdout
    with TemporaryDirectory() as told:
        out, err = Path(told, "out"), Path(told, "err")
        asked = {"arguments": arguments, "folder": str(folder), "environment": environment}
        warm.stdin.write(json.dumps({**asked, "out": str(out), "err": str(err)}) + "\n")
        warm.stdin.flush()
        ready, _, _ = select.select([warm.stdout], [], [], TIMEOUT_S)
        if not ready:
            _end()
            raise subprocess.TimeoutExpired(["tenure", *arguments], TIMEOUT_S)
        status = int(warm.stdout.readline())
        return subprocess.CompletedProcess(["tenure", *arguments], status, out.read_text(), err.read_text())


@functools.cache
def _warm_process() -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "warm_command.py")]
    started = subprocess.Popen(
        command, env={**os.environ, **_FIXED}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    atexit.register(_end)
    return started


def _end() -> None:
    """End the warm process and a command that it runs."""
    process = _warm_process()
    _warm_process.cache_clear()
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()
