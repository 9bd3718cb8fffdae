"""A process that makes no progress writes its stacks and ends, even where Python cannot run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.watch import Watch, hung_since, stacks_file

HANGS = """
import ctypes, sys, threading
from pathlib import Path
from training.watch import Watch
watch = Watch(0.3, Path(sys.argv[1]), grace_s=0.3)
def in_a_call_that_never_returns():
    watch.start()
    {call}
thread = threading.Thread(target=in_a_call_that_never_returns)
thread.start()
thread.join()
"""
CALLS = {"waiting": "threading.Event().wait()", "holding Python": "ctypes.PyDLL(None).sleep(60)"}


@pytest.mark.parametrize("call", CALLS)
def test_a_process_that_hangs_tells_where_and_ends(tmp_path: Path, call: str) -> None:
    stacks = stacks_file(tmp_path / "logs", 3)
    started_s = time.time() - 1
    ended = subprocess.run([sys.executable, "-c", HANGS.format(call=CALLS[call]), str(stacks)], timeout=50, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "in_a_call_that_never_returns" in stacks.read_text(encoding="utf-8")
    assert hung_since(tmp_path / "logs", started_s) == [stacks]
    assert hung_since(tmp_path / "logs", time.time() + 60) == []


def test_progress_puts_the_end_off_and_leaves_no_file(tmp_path: Path) -> None:
    watch = Watch(0.5, tmp_path / "stacks-0.txt", grace_s=0.1)
    watch.start()
    for _ in range(8):
        time.sleep(0.1)
        watch.progress()
    watch.stop()
    time.sleep(1.0)
    assert list(tmp_path.iterdir()) == []


def test_zero_seconds_watch_nothing(tmp_path: Path) -> None:
    watch = Watch(0, tmp_path / "stacks-0.txt")
    watch.start()
    watch.progress()
    watch.stop()
    assert list(tmp_path.iterdir()) == []
