"""Rows of files, one after the other, each with its place; what cannot be read is a fault with a row's number.

Nothing is held but the row at hand: a file may be larger than memory, and a row is at most MAX_ROW_BYTES long.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from training.errors import Problem, TenureError

MAX_ROW_BYTES = 32 * 2**20
Row = dict[str, Any]


class RowFault(Exception):
    """What is wrong with one row, and what to do; the reader adds file and row."""

    def __init__(self, what: str, instead: str = "") -> None:
        super().__init__(what)
        self.what, self.instead = what, instead

    def at(self, where: str) -> Problem:
        """The fault with its place."""
        return Problem(self.what, where, self.instead)


class LastFault(RowFault):
    """A fault after which the file cannot be read on: it is refused even where faulty rows are dropped."""


def open_rows(path: Path) -> Iterator[tuple[str, Row | RowFault]]:
    """Each row's place ("FILE row N", from 1) and its object, or what is wrong with it, as they are asked for.

    Raises:
        TenureError: a file without rows.
    """
    count = 0
    for where, line in _lines(path):
        count += 1
        yield where, line if isinstance(line, RowFault) else _parsed(line)
    if not count:
        raise TenureError(Problem("the file holds no rows", str(path), "write one JSON object per line"))


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row's place and its object, as they are asked for.

    Raises:
        TenureError: the first row that cannot be read, or a file without rows.
    """
    for where, row in open_rows(path):
        if isinstance(row, RowFault):
            raise TenureError(row.at(where))
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, bytes | RowFault]]:
    """Each line that is not blank, with its place; a byte order mark at the start of the file is passed over."""
    with path.open("rb") as stream:
        for number, line in enumerate(_bounded_lines(stream), start=1):
            where = f"{path} row {number}"
            if isinstance(line, RowFault):
                yield where, line
                return
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield where, text.rstrip(b"\r\n")


def _bounded_lines(stream: BinaryIO) -> Iterator[bytes | RowFault]:
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            yield too_long()
            return
        yield line


def too_long() -> LastFault:
    """A row without an end in sight."""
    what = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"
    return LastFault(what, "write one JSON object per line, and cut such a text into several rows")


def _parsed(line: bytes) -> Row | RowFault:
    try:
        return parse(line)
    except RowFault as fault:
        return fault


def parse(line: bytes) -> Row:
    """The object in a line of JSON.

    Raises:
        RowFault: there is none.
    """
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(f"not UTF-8 (byte {error.start})", "save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise RowFault(
            "half of a surrogate pair, which is no character", r"write both halves of \ud83d\ude00"
        ) from None
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg} at column {error.colno}"
        raise RowFault(what, "write one JSON object per line") from None
    except ValueError as error:
        raise RowFault(f"not valid JSON: {error}", "write such a number as text") from None
    except RecursionError:
        raise RowFault("nested too deeply", "write one flat JSON object per line") from None
    if not isinstance(row, dict):
        raise RowFault(f"a {type(row).__name__}, not an object", 'write {"column": value, ...}')
    return row
