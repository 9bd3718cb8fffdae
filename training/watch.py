"""Notices a worker that makes no progress: its stacks are written down, and the process ends.

Neither waits for Python, which a call that never returns may hold: the stacks come from faulthandler's thread in C, and
the end from the kernel's timer. All workers of a run step together, so all that hang tell where they stand.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import IO

GRACE_S = 5.0  # between the stacks and the end, so that every worker has written its own


class Watch:
    """Counts down from `seconds` to the end of this process, and starts anew with every sign of progress."""

    def __init__(self, seconds: float, stacks: Path, grace_s: float = GRACE_S) -> None:
        """`seconds` of 0 watch nothing. `stacks` is a file, which is there only if something was written."""
        self.seconds, self.stacks, self.grace_s = seconds, stacks, grace_s
        self._stream: IO[str] | None = None
        self._end = KillTimer()

    def start(self) -> None:
        """Begin to count, in the process that is to end."""
        if self.seconds:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.stacks.open("a", encoding="utf-8")
            self.progress()

    def progress(self) -> None:
        """Start to count anew; nothing where nothing is watched."""
        if self._stream is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._stream)
            self._end.set(self.seconds + self.grace_s)

    def stop(self) -> None:
        """Count no more."""
        if self._stream is not None:
            faulthandler.cancel_dump_traceback_later()
            self._end.set(0)
            self._stream.close()
            self._stream = None
            if os.path.getsize(self.stacks) == 0:
                self.stacks.unlink()


class _Event(ctypes.Structure):
    """struct sigevent of Linux: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


class _Times(ctypes.Structure):
    """struct itimerspec: interval and first end, in seconds and nanoseconds."""

    _fields_ = (("every", ctypes.c_long * 2), ("first", ctypes.c_long * 2))


class KillTimer:
    """A timer of the kernel's that kills this process (timer_create(2)); setitimer has but one, which others use."""

    def __init__(self) -> None:
        self._timer: ctypes.c_void_p | None = None

    def set(self, seconds: float) -> None:
        """Kill this process in so many seconds, unless set anew before; 0 calls it off."""
        libc = ctypes.CDLL(None, use_errno=True)
        if self._timer is None:
            timer, event = ctypes.c_void_p(), _Event(signo=signal.SIGKILL)
            _check(libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
            self._timer = timer
        whole, part = divmod(seconds, 1)
        times = _Times(first=(ctypes.c_long * 2)(int(whole), int(part * 1e9)))
        _check(libc.timer_settime(self._timer, 0, ctypes.byref(times), None))


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def stacks_file(logs: Path, rank: int) -> Path:
    """Where a worker writes its stacks."""
    return logs / f"stacks-{rank}.txt"


def hung_since(logs: Path, started_s: float) -> list[Path]:
    """The files of workers that wrote their stacks since a time in seconds since 1970."""
    found = sorted(logs.glob("stacks-*.txt"))
    return [file for file in found if file.stat().st_size and file.stat().st_mtime >= started_s]
