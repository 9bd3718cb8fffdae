"""Encoded rows on disk: a folder of memory-mapped Arrow files, published whole or not at all.

Every file (Arrow IPC) has the columns ids, is_target, length and num_targets, so that lengths and counts are read
without the tokens. `meta.json` holds the version, the bytes of each file, and what else there is to tell.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import pyarrow as pa

from training.data.encoding import Encoded
from training.errors import fail
from training.workspace import read_json, write_json

# Raised when the files come to be laid out otherwise.
STORE_VERSION = 1
ROWS_AT_ONCE = 2000
ROWS_PER_RELEASE = 1024
BATCHES_PER_RELEASE = 64
META = "meta.json"
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("is_target", pa.list_(pa.bool_())),
        ("length", pa.int32()),
        ("num_targets", pa.int32()),
    ]
)
Numbers = np.ndarray[Any, np.dtype[Any]]


def batch_of(rows: Sequence[Encoded]) -> pa.RecordBatch:
    """Rows as they lie in a file."""
    lengths = _numbers((len(row.ids) for row in rows), len(rows))
    ends = _numbers(np.concatenate([[0], lengths.cumsum()]), len(rows) + 1)
    ids = np.frombuffer(b"".join(array("i", row.ids) for row in rows), np.int32)
    flags = np.frombuffer(b"".join(bytes(row.is_target) for row in rows), np.bool_)
    lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(values)) for values in (ids, flags)]
    num_targets = _numbers((row.num_targets for row in rows), len(rows))
    return pa.record_batch([*lists, pa.array(lengths), pa.array(num_targets)], schema=SCHEMA)


def _numbers(values: Iterable[int], count: int) -> Numbers:
    return np.fromiter(values, np.int32, count)


class RowWriter:
    """Writes one file of a folder, a batch at a time, so that the rows need not fit into memory."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self._stream = path.open("wb")
        self._writer = pa.ipc.new_file(self._stream, SCHEMA)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:  # or a full disk would be met a second time
                self._writer.close()
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch; an empty one leaves nothing."""
        if batch.num_rows:
            self._writer.write_batch(batch)
            self.num_rows += batch.num_rows

    def write_rows(self, rows: Sequence[Encoded]) -> None:
        """Append rows."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self.write(batch_of(rows[start : start + ROWS_AT_ONCE]))


# ---------------------------------------------------------------------------------------------- sequences of rows


@runtime_checkable
class Counted(Protocol):
    """A sequence of rows that knows their lengths and numbers of targets without a look at the tokens."""

    @property
    def lengths(self) -> Numbers: ...

    @property
    def num_targets(self) -> Numbers: ...


def lengths_of(rows: Sequence[Encoded]) -> Numbers:
    """Tokens (rows,) of every row."""
    return rows.lengths if isinstance(rows, Counted) else _numbers((len(row.ids) for row in rows), len(rows))


def targets_of(rows: Sequence[Encoded]) -> Numbers:
    """Target tokens (rows,) of every row."""
    return rows.num_targets if isinstance(rows, Counted) else _numbers((row.num_targets for row in rows), len(rows))


class StoredRows(Sequence[Encoded]):
    """The rows of a file, each read from the memory map when it is asked for."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._num_read = 0
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = [0, *np.cumsum([batch.num_rows for batch in self._batches]).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = _place(index, len(self))
        number = bisect.bisect_right(self._starts, place) - 1
        ids, is_target = (self._batches[number].column(name)[place - self._starts[number]] for name in range(2))
        wanted = is_target.values.to_numpy(zero_copy_only=False)
        row = Encoded(tuple(ids.values.to_numpy().tolist()), tuple(wanted.tolist()))
        self._num_read += 1
        if self._num_read % ROWS_PER_RELEASE == 0:
            self._release()
        return row

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens (rows,)."""
        return self._column("length")

    @cached_property
    def num_targets(self) -> Numbers:
        """Target tokens (rows,)."""
        return self._column("num_targets")

    def _column(self, name: str) -> Numbers:
        found = np.zeros(len(self), np.int32)
        for number, batch in enumerate(self._batches):
            found[self._starts[number] : self._starts[number + 1]] = batch.column(name).to_numpy()
            if number % BATCHES_PER_RELEASE == 0:
                self._release()
        self._release()
        return found

    def _release(self) -> None:
        """Give pages back that were read: they stay in the system's cache, but no longer count as this process's.

        Every row that is read maps the pages around it, so that in time the whole file would count.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


class JoinedRows(Sequence[Encoded]):
    """Sequences of rows, one after the other."""

    def __init__(self, *parts: Sequence[Encoded]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._starts = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = _place(index, len(self))
        number = bisect.bisect_right(self._starts, place) - 1
        row: Encoded = self._parts[number][place - self._starts[number]]
        return row

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens (rows,)."""
        return np.concatenate([np.zeros(0, np.int32), *(lengths_of(part) for part in self._parts)])

    @cached_property
    def num_targets(self) -> Numbers:
        """Target tokens (rows,)."""
        return np.concatenate([np.zeros(0, np.int32), *(targets_of(part) for part in self._parts)])


class MaskedRows(Sequence[Encoded]):
    """Rows with those targets alone that are kept: flags (targets of all rows,), row after row."""

    def __init__(self, rows: Sequence[Encoded], kept: Numbers) -> None:
        self._rows, self._kept = rows, kept
        self._starts = np.concatenate([[0], np.cumsum(targets_of(rows), dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place, row = _place(index, len(self)), self._rows[index]
        flags = iter(self._kept[self._starts[place] : self._starts[place + 1]].tolist())
        # The first token is no target, so it has no flag.
        return Encoded(row.ids, (False, *(wanted and next(flags) for wanted in row.is_target[1:])))

    @property
    def lengths(self) -> Numbers:
        """Tokens (rows,)."""
        return lengths_of(self._rows)

    @cached_property
    def num_targets(self) -> Numbers:
        """Target tokens (rows,) that are kept."""
        counts = np.concatenate([[0], np.cumsum(self._kept, dtype=np.int64)])
        left: Numbers = np.diff(counts[self._starts]).astype(np.int32)
        return left


def _place(index: int, count: int) -> int:
    place = index + count if index < 0 else index
    if not 0 <= place < count:
        raise IndexError(f"row {index} of {count}")
    return place


# ----------------------------------------------------------------------------------------------- whole or not at all


def write_meta(folder: Path, told: dict[str, Any]) -> None:
    """The last file of a folder: what it holds, and how long each of its files is."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.arrow"))}
    write_json(folder / META, {"version": STORE_VERSION, "bytes": sizes, **told})


def why_unusable(folder: Path) -> str:
    """What is wrong with a folder, in words; empty for one that is whole and of this version."""
    try:
        meta = read_json(folder / META)
        if meta["version"] != STORE_VERSION:
            return (
                f"it was written by another version of Tenure (layout {meta['version']}, this one is {STORE_VERSION})"
            )
        torn = [name for name, size in meta["bytes"].items() if (folder / name).stat().st_size != size]
        for name in [] if torn else meta["bytes"]:
            pa.ipc.open_file(pa.memory_map(str(folder / name)))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        return f"it is not whole: {error}"
    return f"it is not whole: {', '.join(torn)} has another length than was written" if torn else ""


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when all went well, and else goes.

    Who is second to publish the same content leaves what stands: the name says what is inside.

    Raises:
        TenureError: the disk is full, or cannot be written.
    """
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        yield part
        _move(part, target)
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        free = "free some space, or put --workspace on a larger disk"
        raise fail(f"the encoded data cannot be written: {os.strerror(error.errno)}", str(target), free) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _move(part: Path, target: Path) -> None:
    try:
        part.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if why_unusable(target):
            torn = part.with_suffix(".torn")
            target.rename(torn)
            part.rename(target)
            shutil.rmtree(torn)
