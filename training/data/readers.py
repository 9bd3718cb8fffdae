"""Rows of whatever lies at a location, one after the other, each with its place.

Nothing is held but the row at hand, or a batch of a table: data may be larger than memory. What cannot be read is a
fault with a row's number.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator

from training.data.json_rows import read_json, read_lines
from training.data.locations import DataFile, Location, files_of
from training.data.row import LastFault, Read, Row, RowFault
from training.data.table_rows import read_arrow, read_csv, read_parquet
from training.errors import Problem, TenureError

__all__ = ["FORMATS", "LastFault", "Row", "RowFault", "open_rows", "read_rows"]

# By ending; any other is read as JSONL.
FORMATS: dict[str, Callable[[DataFile], Iterator[tuple[int, Read]]]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def open_rows(location: Location) -> Iterator[tuple[str, Read]]:
    """Each row's place ("FILE row N", from 1) and its object, or what is wrong with it, as they are asked for.

    Raises:
        TenureError: there is no file, or none holds a row.
    """
    count, before, name = 0, 0, ""
    for file in files_of(location):
        before = before if file.name == name else 0
        name, number = file.name, 0
        for number, row in _read(file):
            count += 1
            yield f"{name} row {before + number}", row
        before += number
    if not count:
        raise TenureError(Problem("the file holds no rows", str(location), "write one JSON object per line"))


def read_rows(location: Location) -> Iterator[tuple[str, Row]]:
    """Each row's place and its object, as they are asked for.

    Raises:
        TenureError: there is no file or no row; or the first row that cannot be read.
    """
    for where, row in open_rows(location):
        if isinstance(row, RowFault):
            raise TenureError(row.at(where))
        yield where, row


def _read(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The numbered rows of one file; a damaged file ends with a fault in the row that could not be read."""
    number = 0
    try:
        for number, row in FORMATS.get(file.ending, read_lines)(file):
            yield number, row
    except _faults_of(file) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        yield number + 1, LastFault(f"the file is damaged, or not what its ending says: {reason[0]}", _AGAIN)


_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_AGAIN = "write or fetch the file again"


def _faults_of(file: DataFile) -> tuple[type[Exception], ...]:
    """The errors that a damaged file gives; pyarrow, which has its own, is loaded only for files that it reads."""
    if file.ending in (".parquet", ".arrow") or file.path.endswith(".zst"):
        import pyarrow

        return (*_DAMAGED, pyarrow.ArrowException, ValueError, KeyError)
    return _DAMAGED
