"""Rows encoded chunk by chunk, here and in other processes: the same rows, the same faults, bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_spec import sums, write_rows
from transformers import AutoTokenizer

from training.data import encoding, tokenise
from training.data.encoding import Encoded, encode_all
from training.data.rows import Faults, read_conversations
from training.data.tokenise import encoded_chunks
from training.errors import TenureError, fail
from training.section import Source


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(tokenise, "CHUNKS_ALONE", 2)
    monkeypatch.setattr(tokenise.os, "sched_getaffinity", lambda _: {0})


def source_of(folder: Path, rows: list[dict[str, Any]], **columns: str) -> Source:
    columns = columns or {"prompt": "question", "completion": "answer"}
    return Source(path=write_rows(folder / "train.jsonl", rows), **columns)  # type: ignore[arg-type]


def rows_of(batches: list[pa.RecordBatch]) -> list[Encoded]:
    return [Encoded(tuple(row["ids"]), tuple(row["is_target"])) for batch in batches for row in batch.to_pylist()]


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_hold_the_rows_in_order_in_any_number_of_processes(
    tokenizer: Any, tiny_model: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise.os, "sched_getaffinity", lambda _: set(range(processes)))
    source = source_of(tmp_path, sums(65))
    chunks = list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))
    assert [chunk.rows.num_rows for chunk in chunks] == [10] * 6 + [5]
    expected, _ = encode_all(tokenizer, read_conversations(source), True, 64, "refuse")
    assert rows_of([chunk.rows for chunk in chunks]) == expected


def test_faults_of_all_chunks_are_told_as_of_one(tokenizer: Any, tiny_model: Path, tmp_path: Path) -> None:
    rows = sums(45)
    rows[3]["answer"], rows[44]["answer"] = "x" * 70, "x" * 99
    source = source_of(tmp_path, rows)
    longest = max(len(row.ids) for row in encode_all(tokenizer, read_conversations(source), True, 999, "refuse")[0])
    with pytest.raises(TenureError) as caught:
        list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))
    (problem,) = caught.value.problems
    assert problem.what == f"2 rows are longer than max_length 64 (the longest has {longest} tokens)"
    assert problem.where.endswith("train.jsonl row 4")
    chunks = list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "drop"))
    assert [chunk.num_overlong for chunk in chunks] == [1, 0, 0, 0, 1]
    assert sum(chunk.rows.num_rows for chunk in chunks) == 43


def test_pairs_stay_beside_each_other(tokenizer: Any, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"q": "x" * (index % 5), "good": str(index), "bad": f"{index}!"} for index in range(15)]
    source = source_of(tmp_path, rows, prompt="q", chosen="good", rejected="bad")
    chunks = list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))
    chosen, rejected = rows_of([chunk.rows for chunk in chunks]), rows_of([chunk.rejected for chunk in chunks])
    assert len(chosen) == len(rejected) == 15
    assert all(len(two.ids) == len(one.ids) + 1 for one, two in zip(chosen, rejected, strict=True))


def test_no_more_is_read_than_is_asked_for(tokenizer: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A fault in the last row is not met while the first chunk is at hand: the file is not read ahead."""
    source = source_of(tmp_path, [*sums(30), {"question": "1+1"}])
    chunks = encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse")
    assert next(chunks).rows.num_rows == 10
    with pytest.raises(TenureError, match=r"train\.jsonl row 31"):
        list(chunks)


def test_rows_that_cannot_be_encoded_are_dropped_and_counted_where_asked(
    tokenizer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """A template that refuses a row, an answer with nothing to learn: as rows that do not parse, also in processes."""
    refusing = (
        "{% for m in messages %}{% if m.content == '2+2' %}{{ raise_exception('no twos') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = refusing + tokenizer.chat_template
    turns = [[{"role": "user", "content": f"{n}+{n}"}, {"role": "assistant", "content": str(2 * n)}] for n in range(23)]
    turns[14][1]["weight"] = 0
    source = source_of(tmp_path, [*({"turns": one} for one in turns), {"other": 1}], messages="turns")
    with pytest.raises(TenureError) as caught:
        list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))
    told = [(problem.where.rpartition(" row ")[2], problem.what) for problem in caught.value.problems]
    assert [row for row, _ in told] == ["3", "24"]
    assert "refuses the turns user: no twos" in told[0][1]
    faults = Faults(drop=True)
    dropping = source.model_copy(update={"faulty": "drop"})
    chunks = list(encoded_chunks(tokenizer, dropping, str(tiny_model), 64, "refuse", faults=faults))
    assert [chunk.rows.num_rows for chunk in chunks] == [9, 9, 3]
    assert [chunk.num_untaught for chunk in chunks] == [0, 1, 0]
    assert (faults.count, [one.where.rpartition(" ")[2] for one in faults.first]) == (2, ["3", "24"])


def test_pairs_and_texts_with_nothing_to_learn_are_dropped_too(
    tokenizer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"q": "a", "good": "x" * 60 + end, "bad": "x" * 60 + "!"} for end in ("?", "")]
    source = source_of(tmp_path, rows, prompt="q", chosen="good", rejected="bad").model_copy(update={"faulty": "drop"})
    faults = Faults(drop=True)
    (chunk,) = encoded_chunks(tokenizer, source, str(tiny_model), 40, "truncate", faults=faults)
    assert (chunk.rows.num_rows, chunk.rejected.num_rows, faults.count) == (0, 0, 2)
    assert "the pair teaches nothing" in faults.first[0].what


def test_a_fault_of_the_model_stops_even_where_rows_are_dropped(
    tokenizer: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise fail("the model is at fault", "some/model")

    monkeypatch.setattr(encoding, "draft_answers", refuse)
    source = source_of(tmp_path, sums(3)).model_copy(update={"faulty": "drop"})
    with pytest.raises(TenureError, match="some/model: the model is at fault"):
        list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))


def test_long_rows_are_encoded_few_at_a_time(
    tokenizer: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "CHARACTERS_AT_ONCE", 40)
    source = source_of(tmp_path, [{"question": "x" * 15, "answer": "y" * 10}] * 5)
    chunks = list(encoded_chunks(tokenizer, source, str(tiny_model), 64, "refuse"))
    assert [chunk.rows.num_rows for chunk in chunks] == [2, 2, 1]
