"""Turns what goes wrong in a worker into one clear error, and keeps libraries' chatter in a log."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training.errors import TenureError, fail


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send this process's standard output and error, those of C libraries included, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as stream:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, saved in enumerate(kept, start=1):
                os.dup2(saved, target)
                os.close(saved)


@contextmanager
def explained_at(logs: Path) -> Iterator[None]:
    """Raise a TenureError in place of out of memory, a full disk and other errors of the operating system."""
    try:
        yield
    except TenureError:
        raise
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        raise fail(_first_line(error), str(logs), _LESS_MEMORY) from None
    except MemoryError:
        traceback.print_exc()
        raise fail("out of memory", str(logs), _LESS_MEMORY) from None
    except OSError as error:
        traceback.print_exc()
        raise fail(_tell_os_error(error), str(error.filename or logs), _mend_os_error(error)) from None
    except RuntimeError as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            raise fail(_first_line(error), str(logs), _LESS_MEMORY) from None
        if is_disk_full(error):
            raise fail("no space is left on the disk", str(logs), _FREE_SPACE) from None
        raise


_LESS_MEMORY = "lower training.micro_batch_size or max_length, raise scaling.zero_stage, or use tuning.type: lora"
_FREE_SPACE = "free some space, then: tenure resume RUN continues from the last whole checkpoint"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's CPU or GPU allocator says that there is no memory left."""
    text = str(error).lower()
    return "can't allocate memory" in text or "out of memory" in text


def is_disk_full(error: BaseException) -> bool:
    """Whether torch's or safetensors' writer ran out of disk, which they tell in words alone."""
    text = str(error).lower()
    return "no space left" in text or "file write failed" in text or "enforce fail at inline_container" in text


def _tell_os_error(error: OSError) -> str:
    return "no space is left on the disk" if error.errno == errno.ENOSPC else f"{error.strerror or error}"


def _mend_os_error(error: OSError) -> str:
    return _FREE_SPACE if error.errno == errno.ENOSPC else "see the worker's log"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
