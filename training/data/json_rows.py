"""Rows of JSONL, and of a JSON file that holds one list of objects."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from training.data.locations import DataFile
from training.data.row import MAX_ROW_BYTES, LastFault, Read, Row, RowFault, too_long

_CHUNK = 2**18


def read_lines(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The number of each line that is not blank, and its object; a byte order mark at the start is passed over."""
    with file.open() as stream:
        for number, line in enumerate(bounded_lines(stream), start=1):
            if isinstance(line, RowFault):
                yield number, line
            elif line.strip():
                yield number, _parsed(line.rstrip(b"\r\n"))


def bounded_lines(stream: BinaryIO) -> Iterator[bytes | LastFault]:
    """The lines of a file, with their ends; the last is a fault when it is too long to be a row."""
    first = True
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            yield too_long()
            return
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


def read_json(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The objects of a list, counted from 1; or those of lines, where the file starts with no list."""
    with file.open() as stream:
        head = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        if head.startswith(b"["):
            for number, element in enumerate(_elements(head[1:], stream), start=1):
                yield number, element if isinstance(element, RowFault) else _parsed(element)
            return
    yield from read_lines(file)


# A pair of a backslash and what it escapes, or a byte that may open, part or close something.
_MARKS = re.compile(rb'\\.|["{}\[\],]', re.DOTALL)


def _elements(chunk: bytes, stream: BinaryIO) -> Iterator[bytes | LastFault]:
    """The elements of a list whose bracket is open, as they stand: only the one at hand is held.

    Own code, since a parser of the whole (or of a stream of tokens) gives up at the first faulty row, and bounds none.
    """
    depth, quoted, element, count = 1, False, bytearray(), 0
    while chunk:
        while chunk.endswith(b"\\") and (more := stream.read(1)):
            chunk += more
        start = 0
        for mark in _MARKS.finditer(chunk):
            kind = mark.group()
            if kind == b'"':
                quoted = not quoted
            elif quoted or len(kind) == 2:
                continue
            elif kind in b"{[":
                depth += 1
            elif kind in b"}]":
                depth -= 1
            if (kind == b"," and depth == 1 and not quoted) or depth == 0:
                element += chunk[start : mark.start()]
                start = mark.end()
                if depth or count or element.strip():
                    count += 1
                    yield bytes(element).strip()
                element.clear()
            if depth == 0:
                if (chunk[start:] + stream.read(_CHUNK)).strip():
                    yield LastFault("there is more after the list's end", "write one list of objects")
                return
        element += chunk[start:]
        if len(element) > MAX_ROW_BYTES:
            yield too_long()
            return
        chunk = stream.read(_CHUNK)
    yield LastFault("the file ends within the list", "write the file again, up to the closing bracket")


def _parsed(line: bytes) -> Read:
    try:
        return _parse(line)
    except RowFault as fault:
        return fault


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
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


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """An object, unless a key is given twice: which of the two values is meant cannot be told."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowFault(f"the key {twice!r} is given twice in one object", "keep one of them")
    return row
