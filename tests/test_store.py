"""Encoded rows in memory-mapped files: what is read is what was written, and a folder is whole or not there."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from training.data.encoding import Encoded
from training.data.store import (
    META,
    STORE_VERSION,
    JoinedRows,
    MaskedRows,
    RowWriter,
    StoredRows,
    batch_of,
    lengths_of,
    publishing,
    targets_of,
    why_unusable,
    write_meta,
)
from training.errors import TenureError
from training.workspace import read_json, write_json


def random_rows(count: int, seed: int = 0) -> list[Encoded]:
    """Rows of 1 to 20 tokens with ids up to a large vocabulary's."""
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 21) for _ in range(count)]
    return [
        Encoded(
            tuple(draw.randrange(300_000) for _ in range(length)), tuple(draw.random() < 0.5 for _ in range(length))
        )
        for length in lengths
    ]


def write(folder: Path, rows: list[Encoded]) -> Path:
    """A whole folder with rows.arrow."""
    with publishing(folder) as part:
        with RowWriter(part / "rows.arrow") as writer:
            writer.write_rows(rows)
        write_meta(part, {})
    return folder


def test_rows_are_read_back_in_order_over_many_batches(tmp_path: Path) -> None:
    rows = random_rows(4100)
    stored = StoredRows(write(tmp_path / "x", rows) / "rows.arrow")
    assert len(stored) == 4100
    assert list(stored) == rows
    assert (stored[-1], stored[1999:2001]) == (rows[-1], tuple(rows[1999:2001]))
    with pytest.raises(IndexError):
        stored[4100]


def test_lengths_and_target_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = random_rows(2500)
    stored = StoredRows(write(tmp_path / "x", rows) / "rows.arrow")
    for sequence in (rows, stored, JoinedRows(stored, rows[:7], [])):
        assert lengths_of(sequence).tolist() == [len(row.ids) for row in sequence]
        assert targets_of(sequence).tolist() == [row.num_targets for row in sequence]


def test_an_empty_file_and_empty_parts_are_sequences_too(tmp_path: Path) -> None:
    stored = StoredRows(write(tmp_path / "x", []) / "rows.arrow")
    assert (len(stored), list(stored), lengths_of(stored).tolist()) == (0, [], [])
    assert list(JoinedRows(stored, ())) == []
    assert targets_of(JoinedRows()).tolist() == []


def test_masked_rows_lose_the_targets_that_are_not_kept() -> None:
    rows = [Encoded((1, 2, 3), (True, True, True)), Encoded((4, 5), (False, False)), Encoded((6, 7), (False, True))]
    masked = MaskedRows(rows, np.array([False, True, False]))
    assert [row.is_target for row in masked] == [(False, False, True), (False, False), (False, False)]
    assert [row.ids for row in masked] == [row.ids for row in rows]
    assert targets_of(masked).tolist() == [1, 0, 0]
    assert lengths_of(masked).tolist() == [3, 2, 2]


def test_a_batch_holds_32_bit_ids_and_single_bits() -> None:
    rows = random_rows(1000)
    tokens = sum(len(row.ids) for row in rows)
    assert batch_of(rows).nbytes < 4 * tokens + tokens / 8 + 2 * 4 * 1002 + 2 * 4 * 1000 + 1000


def test_a_folder_is_whole_or_says_why_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", random_rows(100))
    assert why_unusable(folder) == ""
    size = (folder / "rows.arrow").stat().st_size
    os.truncate(folder / "rows.arrow", size - 1)
    assert "rows.arrow has another length" in why_unusable(folder)
    os.truncate(folder / "rows.arrow", size)  # as long as it was, with zeros where the footer ended
    (folder / "rows.arrow").write_bytes(b"\0" * size)
    assert why_unusable(folder).startswith("it is not whole: ")
    (folder / "rows.arrow").unlink()
    assert why_unusable(folder).startswith("it is not whole: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', "\0\0"])
def test_a_torn_description_is_told(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "x", random_rows(3))
    (folder / META).write_text(text)
    assert why_unusable(folder)


def test_another_layout_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", random_rows(3))
    write_json(folder / META, read_json(folder / META) | {"version": STORE_VERSION + 1})
    assert "another version of Tenure" in why_unusable(folder)


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    def half() -> None:
        with publishing(tmp_path / "x") as part:
            (part / "rows.arrow").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_leaves_what_stands_and_a_torn_one_is_replaced(tmp_path: Path) -> None:
    first, second = random_rows(5, seed=1), random_rows(5, seed=2)
    folder = write(tmp_path / "x", first)
    assert list(StoredRows(write(folder, second) / "rows.arrow")) == first
    os.truncate(folder / "rows.arrow", 9)
    assert list(StoredRows(write(folder, second) / "rows.arrow")) == second
    assert list(tmp_path.iterdir()) == [folder]


def test_many_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    rows = random_rows(300)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: write(tmp_path / "x", rows), range(16)))
    assert list(tmp_path.iterdir()) == list(folders)
    assert list(StoredRows(tmp_path / "x" / "rows.arrow")) == rows


def test_what_was_mapped_can_be_read_after_it_was_replaced(tmp_path: Path) -> None:
    rows = random_rows(50)
    folder = write(tmp_path / "x", rows)
    mapped = StoredRows(folder / "rows.arrow")
    (folder / META).write_text("")
    write(folder, random_rows(5, seed=2))
    assert list(mapped) == rows


FULL_DISK = """
import resource, sys
from pathlib import Path
from test_store import random_rows, write
from training.errors import TenureError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(Path(sys.argv[1]), random_rows(20_000))
except TenureError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_told_and_leaves_no_half_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "x")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the encoded data cannot be written: File too large" in done.stdout
    assert "put --workspace on a larger disk" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_no_space_left_is_told_as_such(tmp_path: Path) -> None:
    def fill() -> None:
        with publishing(tmp_path / "x"), Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")

    with pytest.raises(TenureError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []
