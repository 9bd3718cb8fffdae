"""Rows of tables: CSV and TSV, Parquet, and Arrow (also what `datasets` saves)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from training.data.json_rows import bounded_lines
from training.data.locations import DataFile
from training.data.row import MAX_ROW_BYTES, LastFault, Read, Row, RowFault, too_long

if TYPE_CHECKING:
    import pyarrow

_SLICE = 64
_BATCH_BYTES = 2**25


def read_csv(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The records below the header, counted from 1; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)  # a setting of the whole process, whose default of 128 KiB is short for text
    with file.open() as stream:
        lines = _Lines(stream)
        records = csv.reader(lines, delimiter="\t" if file.ending == ".tsv" else ",", strict=True)
        header = _record(lambda: next(records, None))
        if header is None or isinstance(header, RowFault) or len(set(header)) < len(header):
            yield from _faulty_header(header)
            return
        number = 0
        while True:
            lines.num_bytes = 0
            record = _record(lambda: next(records, None))
            if record is None:
                return
            number += bool(record)
            if record:
                yield number, record if isinstance(record, RowFault) else _as_row(header, record)
            if isinstance(record, LastFault):
                return


def _faulty_header(header: list[str] | RowFault | None) -> Iterator[tuple[int, Read]]:
    if isinstance(header, RowFault):
        yield 1, LastFault(f"the header: {header.what}", header.instead)
    elif header is not None:
        twice = next(name for name in header if header.count(name) > 1)
        yield 1, LastFault(f"the header names the column {twice!r} twice", "give each column its own name")


class _Lines:
    """Decoded lines, as many as make a record, and no more bytes than a row may have."""

    def __init__(self, stream: BinaryIO) -> None:
        self.lines = bounded_lines(stream)
        self.num_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.num_bytes += MAX_ROW_BYTES + 1 if isinstance(line, RowFault) else len(line)
        if isinstance(line, RowFault) or self.num_bytes > MAX_ROW_BYTES:
            raise too_long()
        return line.decode("utf-8", "surrogateescape")


def _record(read: Callable[[], list[str] | None]) -> list[str] | RowFault | None:
    try:
        return read()
    except csv.Error as error:
        return RowFault(f"not valid CSV: {error}", 'write a text with quotes as "a ""quoted"" word"')
    except LastFault as fault:
        return fault


def _as_row(header: list[str], record: list[str]) -> Read:
    if len(record) != len(header):
        what = f"the row has {len(record)} fields where the header has {len(header)}"
        return RowFault(what, "put quotes around a text that holds the delimiter")
    try:
        "".join(record).encode("utf-8")
    except UnicodeEncodeError:
        return RowFault("not UTF-8", "save the file as UTF-8")
    return dict(zip(header, record, strict=True))


def read_parquet(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The rows of a Parquet file, read in batches of some 32 MiB."""
    from pyarrow.parquet import ParquetFile

    with file.open() as stream:
        table = ParquetFile(stream)
        groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        size = max(1, min(1024, _BATCH_BYTES // max(row_bytes, 1)))
        yield from _numbered(table.schema_arrow, table.iter_batches(batch_size=size))


def read_arrow(file: DataFile) -> Iterator[tuple[int, Read]]:
    """The rows of an Arrow file in the format for files or for streams, read in the batches in which they lie."""
    import pyarrow

    with file.open() as stream:
        is_file = stream.read(len(_ARROW_MARK)) == _ARROW_MARK
        stream.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(stream)
            batches: Iterable[Any] = (table.get_batch(index) for index in range(table.num_record_batches))
            yield from _numbered(table.schema, batches)
        else:
            reader = pyarrow.ipc.open_stream(stream)
            yield from _numbered(reader.schema, reader)


_ARROW_MARK = b"ARROW1"


def _numbered(schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[tuple[int, Read]]:
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        yield 1, LastFault(f"two columns are called {twice[0]!r}", "give each column its own name")
        return
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _SLICE):
            for row in _rows_of(batch.slice(start, _SLICE)):
                number += 1
                yield number, row


def _rows_of(batch: pyarrow.RecordBatch) -> list[Any]:
    """The rows of a batch as objects; where one of them is damaged or too long, each is looked at alone."""
    import pyarrow

    try:
        batch.validate(full=True)
        rows: list[Row] = batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]
        return [RowFault(f"damaged, or not UTF-8: {error}", "write the file again")]
    if batch.nbytes <= MAX_ROW_BYTES:
        return list(rows)
    if batch.num_rows > 1:
        return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]
    return [too_long()]
