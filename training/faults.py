"""Turns what goes wrong in a worker into one clear error, and keeps libraries' chatter in a log."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from training.errors import OutOfMemory, Problem, StorageFault, TenureError, fail
from training.storage import PASSING, error_number


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send this process's standard output and error, those of C libraries included, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as stream:
        _flush()
        kept = [os.dup(1), os.dup(2)]
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            _flush_or_drop()
            for target, saved in enumerate(kept, start=1):
                os.dup2(saved, target)
                os.close(saved)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _flush_or_drop() -> None:
    """A log that cannot be written (a full disk) must not hide the fault that it is about, nor land on the screen."""
    try:
        _flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
        _flush()


@contextmanager
def explained_at(logs: Path) -> Iterator[None]:
    """Raise a TenureError in place of out of memory, a full disk and other errors of the operating system.

    The traceback of whatever is raised is printed, which in a worker means to its log.
    """
    try:
        with ExitStack() as stack:
            stack.push(_print_traceback)
            yield
    except (MemoryError, OSError, RuntimeError, SafetensorError) as error:
        explained = explain(error, logs)
        if explained is None:
            raise
        raise explained from None


def _print_traceback(kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
    if error is not None and not isinstance(error, TenureError):
        with suppress(OSError):
            traceback.print_exception(kind, error, at)


def explain(error: Exception, logs: Path) -> TenureError | None:
    """What a user can do about an error of memory, disk or the operating system; None when it is none of these."""
    if is_out_of_memory(error):
        return OutOfMemory(Problem(_first_line(error) or "out of memory", str(logs), _LESS_MEMORY))
    if is_disk_full(error):
        return fail("no space is left on the disk", str(getattr(error, "filename", None) or logs), _FREE_SPACE)
    if error_number(error) in PASSING:
        return StorageFault(Problem(_first_line(error), str(getattr(error, "filename", None) or logs), _MEND_STORAGE))
    if isinstance(error, OSError):
        return fail(error.strerror or str(error), str(error.filename or logs), "see the worker's log")
    return None


_LESS_MEMORY = "lower training.micro_batch_size or max_length, raise scaling.zero_stage, or use tuning.type: lora"
_MEND_STORAGE = "see to the storage, then: tenure resume RUN continues from the last whole checkpoint"
_FREE_SPACE = "free some space, then: tenure resume RUN continues from the last whole checkpoint"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch's CPU or GPU allocator, says that there is no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


def is_disk_full(error: BaseException) -> bool:
    """Whether a write ran out of disk, which torch's and safetensors' writers tell in words alone."""
    text = str(error).lower()
    words = ("no space left", "file write failed", "enforce fail at inline_container")
    return getattr(error, "errno", None) == errno.ENOSPC or any(word in text for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
