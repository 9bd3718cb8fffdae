"""JSONL rows: what becomes of good ones, and that every bad one is named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_spec import write_rows

from training.data.items import read_items
from training.data.readers import read_rows
from training.data.row import MAX_ROW_BYTES
from training.data.rows import (
    MAX_PROBLEMS,
    Faults,
    examples,
    read_conversations,
    read_passages,
    read_preferences,
)
from training.errors import TenureError
from training.section import Source
from training.spec import Accuracy, CrossEntropy, ExactMatch


def raw(folder: Path, data: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    return path


def source(path: Path, **fields: Any) -> Source:
    return Source(path=path, **(fields or {"prompt": "q", "completion": "a"}))


def faults(path: Path, **fields: Any) -> list[tuple[int, str]]:
    """(row, reason) of every fault in a source."""
    with pytest.raises(TenureError) as caught:
        read_conversations(source(path, **fields))
    return [(int(p.where.removeprefix(f"{path} row ")), p.what) for p in caught.value.problems]


def one_fault(folder: Path, row: Any, **fields: Any) -> str:
    (found,) = faults(write_rows(folder / "rows.jsonl", [row]), **fields)
    assert found[0] == 1
    return found[1]


def test_a_row_becomes_a_user_and_an_assistant_turn(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "1+1", "a": "2", "topic": "sums"}])
    (plain,) = read_conversations(source(path))
    assert plain.messages == ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"})
    assert plain.where == f"{path} row 1"
    fields = {"prompt": "{{ topic }}: {{ q }}?", "completion": "{{ a|upper }}", "system": "You do {{ topic }}."}
    (filled,) = read_conversations(source(path, **fields))
    assert [turn["content"] for turn in filled.messages] == ["You do sums.", "sums: 1+1?", "2"]


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = raw(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xc3\xa9"}')
    assert list(read_rows(path)) == [(f"{path} row 1", {"a": 1}), (f"{path} row 4", {"a": "é"})]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"q": "1", "a": }', "not valid JSON: Expecting value at column 17"),
        (b'{"q": "1"', "not valid JSON: Expecting ',' delimiter at column 10"),
        (b'{"q": "1"} {"q": "2"}', "not valid JSON: Extra data at column 12"),
        (b"{'q': 1}", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'\xef\xbb\xbf{"q": "1"}', "not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1"),
        (b'{"q": "caf\xe9"}', "not UTF-8 (byte 10)"),
        (b'{"q": "\\ud83d"}', "half of a surrogate pair, which is no character"),
        (b'{"q": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["q", "a"]', "a list, not an object"),
        (b'"text"', "a str, not an object"),
        (b"null", "a NoneType, not an object"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = raw(tmp_path, b'{"q": "1", "a": "2"}\n\n' + line + b"\n")
    with pytest.raises(TenureError) as caught:
        list(read_rows(path))
    (problem,) = caught.value.problems
    assert problem.where == f"{path} row 3"
    assert problem.what.startswith(what)
    assert [(row, told.startswith(what)) for row, told in faults(path)] == [(3, True)]


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TenureError, match="the file holds no rows"):
        list(read_rows(raw(tmp_path, data)))


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = raw(tmp_path, b'{"q": "1", "a": "2"}\n' * 10 + b"{\n")
    reading = examples(source(path))
    assert [next(reading).where for _ in range(10)] == [f"{path} row {n}" for n in range(1, 11)]
    with pytest.raises(TenureError, match="row 11: not valid JSON"):
        next(reading)


@pytest.mark.parametrize("ending", [b"\n", b""], ids=["long row", "endless line"])
def test_a_row_without_an_end_is_one_fault_that_even_dropping_does_not_pass(tmp_path: Path, ending: bytes) -> None:
    path = raw(tmp_path, b'{"q": "1", "a": "2"}\n{"q": "' + b"x" * MAX_ROW_BYTES + ending)
    for faults in (Faults(), Faults(drop=True)):
        with pytest.raises(TenureError) as caught:
            list(examples(source(path), faults))
        (problem,) = caught.value.problems
        assert (problem.where, problem.what) == (f"{path} row 2", "the row is longer than 32 MiB")


def test_faulty_rows_are_dropped_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = raw(tmp_path, b'{"q": "1", "a": "2"}\n' + b"{\n" * 30 + b'{"q": "1"}\n{"q": "3", "a": "4"}\n')
    faults = Faults(drop=True)
    assert [example.where for example in examples(source(path), faults)] == [f"{path} row 1", f"{path} row 33"]
    assert (faults.count, len(faults.first)) == (31, MAX_PROBLEMS)
    assert faults.first[0].where == f"{path} row 2"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"q": "1"}, "there is no column 'a'"),
        ({"q": "1", "a": 2}, "'a' is int, not text"),
        ({"q": None, "a": "2"}, "'q' is null, not text"),
        ({"q": ["1"], "a": "2"}, "'q' is list, not text"),
        ({"q": "1", "a": ""}, "'a' is empty: there is no target token to learn or score"),
        ({"q": "1", "a": " \n"}, "'a' is empty: there is no target token to learn or score"),
    ],
)
def test_a_row_without_what_is_asked_for_is_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    assert one_fault(tmp_path, row) == what


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "1", "answer": "2"}])
    with pytest.raises(TenureError) as caught:
        read_conversations(source(path))
    assert caught.value.problems[0].instead == "columns here: question, answer"


def test_faults_of_all_kinds_are_gathered_up_to_twenty(tmp_path: Path) -> None:
    good, bad = b'{"q": "1", "a": "2"}\n', [b"{\n", b'{"q": "1"}\n', b"[]\n"]
    path = raw(tmp_path, good + b"".join(bad))
    assert [row for row, _ in faults(path)] == [2, 3, 4]
    path = raw(tmp_path, b"{}\n" * 50)
    assert [row for row, _ in faults(path)] == list(range(1, MAX_PROBLEMS + 1))


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}",
        "{{ q.missing }}",
        "{{ q",
        "{{ q|nofilter }}",
        "{{ q.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ q.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ cycler }}",
        "{{ n / 0 }}",
        "{{ q + n }}",
        "{{ q * 10**12 }}",
        "{{ q * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ items.append(1) }}",
        "{% include 'x' %}{{ q }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_fault_of_the_row(tmp_path: Path, template: str) -> None:
    what = one_fault(tmp_path, {"q": "1", "a": "2", "n": 1, "items": []}, prompt=template, completion="a")
    assert what.startswith(f"the template {template!r} failed: ")


def test_a_template_may_loop_over_what_the_row_holds(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"steps": ["a", "b"], "a": "2"}])
    (read,) = read_conversations(
        source(path, prompt="{% for s in steps %}{{ loop.index }}{{ s }} {% endfor %}", completion="a")
    )
    assert read.messages[0]["content"] == "1a 2b "


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"turns": [{"role": role, "content": content} for role, content in pairs]}


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    row = turns(("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    (read,) = read_conversations(source(write_rows(tmp_path / "rows.jsonl", [row]), messages="turns"))
    assert list(read.messages) == row["turns"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "'turns' is no list of turns"),
        ({"turns": []}, "'turns' is no list of turns"),
        ({"turns": "hello"}, "'turns' is no list of turns"),
        ({"turns": ["hello"]}, "turn 1 is no object with role and content"),
        ({"turns": [{"role": "user"}]}, "turn 1 has no text as its content"),
        (
            {"turns": [{"role": "user", "content": ["a"]}]},
            "turn 1 holds a part of the type 'str'; text alone can be learned",
        ),
        (turns(("human", "1"), ("assistant", "2")), "the role 'human' of turn 1 is unknown"),
        (
            turns(("assistant", "1"), ("user", "2")),
            "there is nothing to learn: the last turn is not a filled assistant turn",
        ),
        (
            turns(("user", "1"), ("assistant", "  ")),
            "there is nothing to learn: the last turn is not a filled assistant turn",
        ),
    ],
)
def test_messages_that_are_none_are_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    assert one_fault(tmp_path, row, messages="turns") == what


PAIR = {"prompt": "q", "chosen": "{{ a }}!", "rejected": "b", "system": "You know {{ q }}."}


def test_a_pair_is_two_conversations_that_differ_in_the_answer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "1+1", "a": "2", "b": "3"}])
    (pair,) = read_preferences(source(path, **PAIR))
    assert pair.chosen.messages[:2] == pair.rejected.messages[:2]
    assert [turn["content"] for turn in pair.chosen.messages] == ["You know 1+1.", "1+1", "2!"]
    assert pair.rejected.messages[2] == {"role": "assistant", "content": "3"}
    assert pair.chosen.where == pair.rejected.where == f"{path} row 1"


def test_every_pair_without_two_answers_is_named(tmp_path: Path) -> None:
    rows = [
        {"q": "1+1", "a": "2"},
        {"q": "1+1", "a": "2", "b": " "},
        {"q": "1+1", "a": "2", "b": "2!"},
        {"q": "1+1", "a": "2", "b": "3"},
        {"q": "1+1", "a": "2", "b": 3},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(TenureError) as caught:
        read_preferences(source(path, **PAIR))
    assert [(problem.where.removeprefix(f"{path} "), problem.what) for problem in caught.value.problems] == [
        ("row 1", "there is no column 'b'"),
        ("row 2", "'b' is empty: there is no target token to learn or score"),
        ("row 3", "the chosen and the rejected answer are the same: the pair teaches nothing"),
        ("row 5", "'b' is int, not text"),
    ]


def test_texts_are_read_by_column_or_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"t": "a b", "u": "c"}])
    (plain,), (filled,) = (read_passages(source(path, text=text)) for text in ("t", "{{ t }} {{ u }}"))
    assert (plain.text, filled.text, plain.where) == ("a b", "a b c", f"{path} row 1")
    with pytest.raises(TenureError, match="'t' is empty"):
        read_passages(source(write_rows(path, [{"t": ""}]), text="t"))


def accuracy(folder: Path, row: dict[str, Any], **fields: Any) -> Any:
    path = write_rows(folder / "items.jsonl", [row])
    return read_items(Accuracy(name="s", path=path, metric="accuracy", prompt="q", answer="answer", **fields))


@pytest.mark.parametrize(("answer", "right"), [(0, 0), (2, 2), ("red", 0), ("blue", 2)])
def test_the_right_choice_is_given_by_index_or_by_text(tmp_path: Path, answer: Any, right: int) -> None:
    row = {"q": "colour?", "options": ["red", "green", "blue"], "answer": answer}
    (item,) = accuracy(tmp_path, row, choices="options")
    assert (item.right, item.completion, item.choices) == (right, row["options"][right], ("red", "green", "blue"))


def test_choices_may_be_the_same_for_all_rows(tmp_path: Path) -> None:
    (item,) = accuracy(tmp_path, {"q": "true?", "answer": "no"}, choices=("yes", "no"))
    assert (item.right, item.choices) == (1, ("yes", "no"))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"options": ["a", "b"], "answer": 2}, "the answer 2 is no index into 2 choices"),
        ({"options": ["a", "b"], "answer": -1}, "the answer -1 is no index into 2 choices"),
        ({"options": ["a", "b"], "answer": "c"}, "the answer 'c' is none of the choices ['a', 'b']"),
        ({"options": ["a", "b"], "answer": True}, "the answer 'True' is none of the choices ['a', 'b']"),
        ({"options": ["a"], "answer": 0}, "the choices are no list of two or more texts: ['a']"),
        ({"options": ["a", 2], "answer": 0}, "the choices are no list of two or more texts: ['a', 2]"),
        ({"options": "ab", "answer": 0}, "the choices are no list of two or more texts: 'ab'"),
        ({"answer": 0}, "there is no column 'options'"),
        ({"options": ["a", "b"]}, "there is no column 'answer'"),
    ],
)
def test_choices_that_are_none_are_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(TenureError) as caught:
        accuracy(tmp_path, {"q": "?", **row}, choices="options")
    assert [problem.what for problem in caught.value.problems] == [what]


def test_a_limit_takes_the_first_items(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "items.jsonl", [{"q": str(n), "a": "x"} for n in range(5)])
    suite = ExactMatch(name="s", path=path, metric="exact_match", prompt="q", completion="a", limit=2)
    assert [item.prompt for item in read_items(suite)] == ["0", "1"]


def test_cross_entropy_takes_text_or_a_pair(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "items.jsonl", [{"q": "1+1", "a": "2"}])
    (text,) = read_items(CrossEntropy(name="s", path=path, metric="cross_entropy", text="{{ q }}={{ a }}"))
    (pair,) = read_items(CrossEntropy(name="s", path=path, metric="cross_entropy", prompt="q", completion="a"))
    assert (text.prompt, text.completion) == ("", "1+1=2")
    assert (pair.prompt, pair.completion) == ("1+1", "2")


lines = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.none(), max_size=3).map(
        lambda row: json.dumps(row).encode()
    ),
)


@settings(deadline=None, database=None)
@given(st.lists(lines, max_size=6))
def test_any_bytes_give_objects_or_a_named_row(data: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = raw(Path(folder), b"\n".join(data))
        try:
            rows = list(read_rows(path))
        except TenureError as error:
            (problem,) = error.problems
            assert problem.where.startswith(f"{path} row ") or problem.what == "the file holds no rows"
        else:
            assert rows
            assert all(isinstance(row, dict) for _, row in rows)
