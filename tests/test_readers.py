"""Rows of every format and place: the same rows from all of them, and every fault with file and row."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import row as row_module
from training.data.locations import ENDINGS, DataFile, files_of, hash_data
from training.data.readers import FORMATS, open_rows, read_rows
from training.data.row import RowFault
from training.errors import TenureError
from training.models import hash_file

ROWS = [{"q": f'Ünï {n}, "quoted"\nand broken', "a": str(n)} for n in range(150)]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "\r\n".join(delimiter.join(record) for record in [list(rows[0]), *quoted]).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, row_group_size=40)
    return stream.getvalue()


def as_arrow(rows: list[dict[str, Any]], open_writer: Any = pyarrow.ipc.new_file) -> bytes:
    stream, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with open_writer(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": as_lines,
    "rows.ndjson": as_lines,
    "rows.txt": as_lines,
    "lines.json": as_lines,
    "list.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n ",
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
    "stream.arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_stream),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def faults(location: Path | str) -> list[tuple[str, str]]:
    """(place, reason) of every row that cannot be read."""
    return [(where, row.what) for where, row in open_rows(location) if isinstance(row, RowFault)]


def refusal(location: Path | str) -> tuple[str, str]:
    with pytest.raises(TenureError) as caught:
        list(open_rows(location))
    (problem,) = caught.value.problems
    return problem.what, problem.instead


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, WRITERS[name](ROWS))
    read = list(read_rows(path))
    assert [row for _, row in read] == ROWS
    assert [where for where, _ in read] == [f"{path} row {n}" for n in range(1, 151)]


def test_every_format_that_folders_are_searched_for_has_a_reader() -> None:
    assert tuple(FORMATS) == ENDINGS


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "rows.csv"])
def test_packed_files_are_unpacked(tmp_path: Path, name: str, packed: str) -> None:
    path = written(tmp_path, name + packed, PACKERS[packed](WRITERS[name](ROWS)))
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_breaks_off_is_a_fault_of_the_row_where_it_does(tmp_path: Path, packed: str) -> None:
    import random

    letters = random.Random(0)
    rows = [{"q": "".join(letters.choices("abcdefghijklmnop", k=200))} for _ in range(5000)]
    whole = PACKERS[packed](as_lines(rows))
    path = written(tmp_path, "rows.jsonl" + packed, whole[: len(whole) * 3 // 4])
    *read, (where, fault) = open_rows(path)
    assert isinstance(fault, row_module.LastFault)
    assert where == f"{path} row {len(read) + 1}"
    assert [row for _, row in read] == rows[: len(read)]


class Endless(io.RawIOBase):
    """A file that goes on for ever: a head, then the same bytes again and again."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.data, self.body = head, body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self.data) < len(buffer):
            self.data += self.body
        buffer[:], self.data = self.data[: len(buffer)], self.data[len(buffer) :]
        return len(buffer)


class EndlessFiles:
    """As much of a file system of fsspec as is asked of one."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.parts = head, body

    def open(self, path: str, mode: str) -> io.BufferedReader:
        return io.BufferedReader(Endless(*self.parts))


@pytest.mark.parametrize(
    ("name", "head", "body"),
    [
        ("rows.jsonl", b"", b'{"q": "1"}\n'),
        ("rows.json", b"[", b'{"q": "1"},'),
        ("rows.csv", b"q\n", b'"1"\n'),
    ],
)
def test_rows_are_read_as_they_are_asked_for(name: str, head: bytes, body: bytes) -> None:
    rows = FORMATS[Path(name).suffix](DataFile(name, name, EndlessFiles(head, body)))
    assert list(islice(rows, 1000)) == [(number, {"q": "1"}) for number in range(1, 1001)]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("rows.jsonl", b'{"q": "1"}\n{"q": "'),
        ("rows.json", b'[{"q": "1"}, {"q": "'),
        ("rows.json", b'[{"q": "1"}, '),
        ("rows.csv", b'q\n1\n"'),
        ("rows.csv", b'q\n1\n"\n'),
    ],
)
@pytest.mark.parametrize("body", [b"x" * 1000, b"x\n"])
def test_a_row_without_an_end_is_a_fault_of_that_row(
    monkeypatch: pytest.MonkeyPatch, name: str, head: bytes, body: bytes
) -> None:
    if name == "rows.jsonl" and body.endswith(b"\n"):
        pytest.skip("lines that end are rows")
    for module in ("json_rows", "table_rows", "row"):
        monkeypatch.setattr(f"training.data.{module}.MAX_ROW_BYTES", 2**20)
    rows = list(FORMATS[Path(name).suffix](DataFile(name, name, EndlessFiles(head, body))))
    (first, good), (second, fault) = rows
    assert (first, good, second) == (1, {"q": "1"}, 2)
    assert isinstance(fault, row_module.LastFault)
    assert fault.what == "the row is longer than 1 MiB"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "stream.arrow"])
def test_a_row_of_a_table_that_is_too_long_is_a_fault_of_that_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("table_rows", "row"):
        monkeypatch.setattr(f"training.data.{module}.MAX_ROW_BYTES", 2**20)
    path = written(tmp_path, name, WRITERS[name]([{"q": "1"}] * 4 + [{"q": "x" * 2**20}] + [{"q": "1"}]))
    assert faults(path) == [(f"{path} row 5", "the row is longer than 1 MiB")]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b'[{"q": 1}, {"q": }, [], {"q": 2}]', [(2, "not valid JSON"), (3, "a list, not an object")]),
        ("a.json", b'[{"q": 1},]', [(2, "not valid JSON: Expecting value")]),
        ("a.json", b'[{"q": 1}, {"q": "2"', [(2, "the file ends within the list")]),
        ("a.json", b'[{"q": 1}, {"q": "2\\', [(2, "the file ends within the list")]),
        ("a.json", b'[{"q": 1}] {"q": 2}', [(2, "there is more after the list's end")]),
        ("a.json", b'{\n "q": 1\n}', [(1, "not valid JSON"), (2, "not valid JSON"), (3, "not valid JSON")]),
        ("a.json", b'[{"q": "caf\xe9"}, {"q": "\\"]}"}]', [(1, "not UTF-8 (byte 10)")]),
        ("a.jsonl", b'{"q": 1, "a": 2, "q": 3}\n', [(1, "the key 'q' is given twice in one object")]),
        ("a.jsonl", b'{"q": {"a": 1, "a": 1}}\n', [(1, "the key 'a' is given twice in one object")]),
        ("a.csv", b"q,a\n1,2\n3\n4,5,6\n\n7,8\n", [(2, "the row has 1 fields"), (3, "the row has 3 fields")]),
        ("a.csv", b'q,a\n1,"2"x\n3,4\n', [(1, "not valid CSV: ',' expected after '\"'")]),
        ("a.csv", b'q,a\n1,2\n3,"4\n5,6\n', [(2, "not valid CSV: unexpected end of data")]),
        ("a.csv", b"q,a\n1,caf\xe9\n3,4\n", [(1, "not UTF-8")]),
        ("a.csv", b"q,a,q\n1,2,3\n", [(1, "the header names the column 'q' twice")]),
        ("a.csv", b"q,a\r1,2\r", [(1, "the header: not valid CSV: new-line character seen in unquoted field")]),
        ("a.parquet", b"PAR1 and nothing more", [(1, "the file is damaged, or not what its ending says")]),
        ("a.arrow", b"ARROW1 and nothing more", [(1, "the file is damaged, or not what its ending says")]),
        ("a.jsonl.gz", b'{"q": 1}\n', [(1, "the file is damaged, or not what its ending says: Not a gzipped file")]),
        ("a.jsonl.zst", b'{"q": 1}\n', [(1, "the file is damaged, or not what its ending says")]),
        ("a.parquet.gz", gzip.compress(as_lines(ROWS)), [(1, "the file is damaged, or not what its ending says")]),
    ],
)
def test_a_fault_is_told_with_its_row(tmp_path: Path, name: str, data: bytes, expected: list[tuple[int, str]]) -> None:
    path = written(tmp_path, name, data)
    told = faults(path)
    assert [where for where, _ in told] == [f"{path} row {number}" for number, _ in expected]
    assert all(what.startswith(start) for (_, what), (_, start) in zip(told, expected, strict=True)), told


@pytest.mark.parametrize("open_writer", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_a_damaged_text_in_a_table_is_a_fault_of_its_row(tmp_path: Path, open_writer: Any) -> None:
    data = as_arrow([{"q": f"text{n}"} for n in range(100)], open_writer).replace(b"text77", b"te\xe9t77")
    path = written(tmp_path, "rows.arrow", data)
    ((where, what),) = faults(path)
    assert where == f"{path} row 78"
    assert what.startswith("damaged, or not UTF-8")
    assert sum(not isinstance(row, RowFault) for _, row in open_rows(path)) == 99


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["1"], ["2"]], names=["q", "q"])
    stream = io.BytesIO()
    with pyarrow.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    path = written(tmp_path, "rows.arrow", stream.getvalue())
    assert faults(path) == [(f"{path} row 1", "two columns are called 'q'")]


def test_a_glob_and_a_folder_give_the_rows_of_their_files_in_order(tmp_path: Path) -> None:
    first = written(tmp_path, "b/1.jsonl", as_lines(ROWS[:2]))
    second = written(tmp_path, "b/2.csv.gz", gzip.compress(as_csv(ROWS[2:4])))
    third = written(tmp_path, "b/deeper/3.parquet", as_parquet(ROWS[4:5]))
    written(tmp_path, "b/README.md", b"# no data")
    expected = [f"{first} row 1", f"{first} row 2", f"{second} row 1", f"{second} row 2", f"{third} row 1"]
    read = list(read_rows(tmp_path / "b"))
    assert [where for where, _ in read] == expected
    assert [row for _, row in read] == ROWS[:5]
    assert [where for where, _ in read_rows(tmp_path / "b" / "[12].*")] == expected[:4]
    assert [where for where, _ in read_rows(tmp_path / "b" / "**" / "*.parquet")] == expected[4:]


def test_a_name_with_the_signs_of_a_glob_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "rows[1].jsonl", as_lines(ROWS[:1]))
    assert [where for where, _ in read_rows(path)] == [f"{path} row 1"]


def test_a_saved_dataset_is_read_and_its_rows_are_counted_over_its_parts(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).filter(lambda row: row["a"] != "0").save_to_disk(tmp_path / "saved", num_shards=3)
    read = list(read_rows(tmp_path / "saved"))
    assert [row for _, row in read] == ROWS[1:]
    assert [where for where, _ in read] == [f"{tmp_path / 'saved'} row {n}" for n in range(1, 150)]


def test_of_several_saved_splits_one_must_be_named(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list(ROWS[:n]) for name, n in [("train", 3), ("test", 2)]}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    what, instead = refusal(tmp_path / "saved")
    assert (what, instead) == ("the dataset has the splits train, test", f"give one: {tmp_path / 'saved' / 'train'}")
    assert [row for _, row in read_rows(tmp_path / "saved" / "test")] == ROWS[:2]
    datasets.DatasetDict({"only": splits["test"]}).save_to_disk(tmp_path / "single")
    assert [row for _, row in read_rows(tmp_path / "single")] == ROWS[:2]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl")[0] == f"there is no file {tmp_path / 'none.jsonl'}"
    assert refusal(tmp_path / "*.jsonl")[0] == f"no file matches {tmp_path / '*.jsonl'}"
    assert refusal(tmp_path)[0] == f"the folder {tmp_path} holds no data files"
    assert refusal("memory://nowhere/rows.jsonl")[0] == "there is no such file"


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "rows.txt"])
def test_stores_of_fsspec_give_the_same_rows(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, WRITERS[name](ROWS))
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/bucket/{name}/{name}", path.read_bytes())
    for url in (f"file://{path}", f"memory://bucket/{name}/{name}", f"memory://bucket/{name}/*"):
        assert [row for _, row in read_rows(url)] == ROWS
    assert next(read_rows(f"memory://bucket/{name}"))[0] == f"memory:///bucket/{name}/{name} row 1"


def test_a_store_without_its_package_and_an_unknown_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.locations.find_spec", lambda package: None)
    needs = "s3:// needs the package s3fs, which is not installed"
    assert refusal("s3://bucket/rows.jsonl") == (needs, "run: pip install s3fs")
    assert refusal("gs://bucket/*.parquet")[1] == "run: pip install gcsfs"
    assert refusal("s4://bucket/rows.jsonl")[0] == "the store s4:// is unknown"


def test_a_store_that_gives_no_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise ZeroDivisionError("no credentials")

    monkeypatch.setattr("training.data.locations._listed", refuse)
    assert refusal("memory://bucket/rows.jsonl")[0] == "the store gave no answer: ZeroDivisionError: no credentials"


_HUB = """
import shutil
import sys
from pathlib import Path
from datasets.config import HF_DATASETS_CACHE
from datasets.packaged_modules.parquet.parquet import Parquet
from training.errors import TenureError
from training.data.readers import read_rows

for split in ({"train": "a.parquet", "test": "b.parquet"}, {"train": "a.parquet"}):
    name = "cached" if len(split) == 2 else "single"
    files = {key: [str(Path(sys.argv[1]) / file)] for key, file in split.items()}
    builder = Parquet(dataset_name=name, config_name="default", hash="0123", data_files=files)
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, Path(HF_DATASETS_CACHE) / f"owner___{name}" / "default" / "0.0.0" / "0123")
for url in sys.argv[2:]:
    try:
        print([(where, row["a"]) for where, row in read_rows(url)])
    except TenureError as error:
        print(str(error).replace("\\n    ", " "))
"""


def test_a_dataset_of_the_hub_comes_from_its_cache_or_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "a.parquet", as_parquet(ROWS[:2]))
    written(tmp_path, "b.parquet", as_parquet(ROWS[2:3]))
    urls = ["hf://owner/cached:test", "hf://owner/cached", "hf://owner/cached/default:dev", "hf://owner/single"]
    urls += ["hf://owner/none", "hf://cached", "hf://owner/cached/other"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", _HUB, str(tmp_path), *urls]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    test, several, dev, single, none, bare, other = done.stdout.splitlines()
    assert test == "[('hf://owner/cached:test row 1', '2')]"
    assert several == (
        "hf://owner/cached: the dataset has several splits: it has train, test -> write hf://owner/cached:train"
    )
    assert dev.startswith("hf://owner/cached/default:dev: there is no split dev: it has train, test")
    assert single == "[('hf://owner/single:train row 1', '0'), ('hf://owner/single:train row 2', '1')]"
    assert none.startswith("hf://owner/none: the hub gave no dataset: Couldn't reach 'owner/none' on the Hub")
    assert bare.startswith("hf://cached: hf://cached names no dataset -> write hf://OWNER/NAME")
    assert other.startswith("hf://owner/cached/other: the hub gave no dataset:")


def test_the_hash_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    path = written(tmp_path, "a/rows.jsonl", as_lines(ROWS))
    copy = written(tmp_path, "b/rows.jsonl", as_lines(ROWS))
    assert hash_data(path) == hash_data(copy) == hash_data(f"file://{path}") == hash_file(path)
    written(tmp_path, "a/more.jsonl", as_lines(ROWS[:1]))
    assert hash_data(tmp_path / "a") not in (hash_data(path), hash_data(tmp_path / "b"))
    assert len(files_of(tmp_path / "a")) == 2


def read_or_none(path: Path) -> list[tuple[str, Any]]:
    """The rows and faults of a file; none where it is refused for having no row."""
    try:
        return list(open_rows(path))
    except TenureError as error:
        if [problem.what for problem in error.problems] != ["the file holds no rows"]:
            raise
        return []


FEW = [{"q": 'ä,"b"', "n": [1, None], "m": {"x": "y"}}, {"q": "c\nd", "n": [], "m": None}]
SMALL = {name: write(FEW) for name, write in WRITERS.items()}


@settings(deadline=None, database=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(WRITERS)), st.sampled_from(["", *PACKERS]), st.data())
def test_any_damage_gives_rows_or_faults_with_their_rows(name: str, packed: str, data: st.DataObject) -> None:
    whole = PACKERS[packed](SMALL[name]) if packed else SMALL[name]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 8)))
    content = whole[:start] + data.draw(st.binary(max_size=8)) + (whole[end:] if data.draw(st.booleans()) else b"")
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), name + packed, content)
        read = read_or_none(path)
        numbers = [int(where.removeprefix(f"{path} row ")) for where, _ in read]
        assert numbers == sorted(set(numbers))
        assert all(number >= 1 for number in numbers)
        assert all(isinstance(row, dict | RowFault) for _, row in read)


@settings(deadline=None, database=None, max_examples=100)
@given(st.sampled_from(sorted(ENDINGS)), st.binary(max_size=200))
def test_any_bytes_under_any_name_give_rows_or_faults(ending: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read = read_or_none(written(Path(folder), f"rows{ending}", content))
        assert all(isinstance(row, dict | RowFault) for _, row in read)
