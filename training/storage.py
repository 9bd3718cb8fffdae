"""Writing to a disk, or a share, that fails for a while."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

Result = TypeVar("Result")

# What passes by itself on a share whose server restarts or is out of reach; a full or read-only disk does not.
PASSING = (
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)
WAITS_S = (1.0, 4.0, 16.0)


def patiently(action: Callable[[], Result], what: str, waits_s: Sequence[float] = WAITS_S) -> Result:
    """Do what writes or reads, again after each wait while the storage's fault is one that passes.

    Args:
        action: leaves nothing behind when it fails that keeps it from being done again.
        what: is told with the fault, in the worker's log.

    Raises:
        OSError or SafetensorError: the last fault, when all waits are over or when it is none that passes.
    """
    for wait_s in waits_s:
        try:
            return action()
        except (OSError, SafetensorError) as error:
            if error_number(error) not in PASSING:
                raise
            print(f"{what}: {error}; again in {wait_s:g} s", flush=True)
        time.sleep(wait_s)
    return action()


def error_number(error: BaseException) -> int | None:
    """The operating system's number of a fault, which safetensors' writer tells in words alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told.group(1)) if told else None


def settle(path: Path) -> None:
    """Make a file's bytes, or a folder's names, outlive a loss of power.

    Raises:
        OSError: the disk failed to keep them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, such as some in user space
            raise
    finally:
        os.close(handle)
