"""The form of rows is recognised by their columns, frozen in the spec, and refused where it is not the only one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tiny_spec import sums, write_rows, write_tiny_spec

from training.data.items import read_items
from training.data.rows import Conversation, Example, Faults, Preference, examples
from training.data.shapes import recognise
from training.errors import TenureError
from training.section import Source
from training.specfile import load_spec
from training.suite_spec import Suite

TURNS = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
SHAREGPT = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]


def rows_of(folder: Path, *rows: dict[str, Any], **fields: Any) -> list[Example]:
    return list(examples(Source(path=write_rows(folder / "rows.jsonl", list(rows)), **fields)))


def told(example: Example) -> Any:
    """An example as (role, content) pairs, a pair of such for a preference, or the text."""
    if isinstance(example, Preference):
        return told(example.chosen), told(example.rejected)
    if isinstance(example, Conversation):
        return [(turn["role"], turn["content"]) for turn in example.messages]
    return example.text


def refusal(folder: Path, *rows: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(TenureError) as caught:
        rows_of(folder, *rows, **fields)
    (problem,) = caught.value.problems
    return str(problem).replace(str(folder), "").replace("\n    ", " ")


PAIR = [("user", "1+1"), ("assistant", "2")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+1", "completion": "2"}, PAIR),
        ({"question": "1+1", "answer": "2", "id": 3, "topic": "sums"}, PAIR),
        ({"input": "1+1", "output": "2"}, PAIR),
        ({"instruction": "1+1", "response": "2"}, PAIR),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, [("user", "Add.\n\n1+1"), ("assistant", "2")]),
        ({"instruction": "1+1", "input": "", "output": "2"}, PAIR),
        ({"system_prompt": "You add.", "question": "1+1", "response": "2"}, [("system", "You add."), *PAIR]),
        ({"system": None, "question": "1+1", "response": "2"}, PAIR),
        ({"messages": TURNS}, PAIR),
        ({"conversations": SHAREGPT, "id": "x"}, PAIR),
        ({"conversations": {"from": ["human", "gpt"], "value": ["1+1", "2"]}}, PAIR),
        ({"text": "a b"}, "a b"),
        ({"prompt": "1+1", "chosen": "2", "rejected": "3"}, (PAIR, [PAIR[0], ("assistant", "3")])),
        (
            {"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "3"}]},
            (PAIR, [PAIR[0], ("assistant", "3")]),
        ),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{**TURNS[1], "content": "3"}]},
            (PAIR, [PAIR[0], ("assistant", "3")]),
        ),
        (
            {"prompt": "1+1", "chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "3"}]},
            (PAIR, [PAIR[0], ("assistant", "3")]),
        ),
    ],
)
def test_a_form_is_recognised_by_its_columns(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    assert [told(example) for example in rows_of(tmp_path, row, row)] == [expected, expected]
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [told(example) for example in examples(Source(path=tmp_path / "rows.parquet"))] == [expected]


def test_a_column_that_some_rows_leave_out_is_optional(tmp_path: Path) -> None:
    rows = [{"instruction": "1+1", "output": "2"}, {"instruction": "Add.", "input": "1+1", "output": "2"}]
    expected = [PAIR, [("user", "Add.\n\n1+1"), ("assistant", "2")]]
    assert [told(example) for example in rows_of(tmp_path, *rows)] == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"question": "1+1", "answer": "2", "text": "1+1=2"}],
            "/rows.jsonl: the columns fit several forms: prompt: question, completion: answer; or text: text "
            "-> name the columns of the one that is meant",
        ),
        (
            [{"prompt": "p", "question": "q", "answer": "a"}],
            "/rows.jsonl: the columns fit several forms: prompt: prompt, completion: answer; "
            "or prompt: question, completion: answer -> name the columns",
        ),
        ([{"q": "1+1", "a": "2"}], "/rows.jsonl row 1: the columns fit no form: q, a -> name them in the source."),
        ([{"question": "1+1", "answer": 2}], "/rows.jsonl row 1: the columns fit no form: question, answer"),
        (
            [{"question": "1+1", "answer": "2"}, {"text": "a"}],
            "/rows.jsonl row 2: this row's columns are others than the first row's, and no form is common to all",
        ),
    ],
)
def test_what_is_not_clear_is_refused_with_how_to_say_it(
    tmp_path: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    assert refusal(tmp_path, *rows).startswith(expected)


def test_columns_that_are_named_are_taken_where_several_forms_fit(tmp_path: Path) -> None:
    row = {"question": "1+1", "answer": "2", "text": "1+1=2"}
    assert told(rows_of(tmp_path, row, prompt="question", completion="answer")[0]) == PAIR
    assert told(rows_of(tmp_path, row, text="text")[0]) == "1+1=2"


def test_a_spec_holds_what_was_recognised_from_then_on(tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tmp_path)
    path.write_text(path.read_text().replace("    prompt: question\n    completion: answer\nsuites", "suites"))
    spec = load_spec(path)
    assert (spec.data.train[0].prompt, spec.data.train[0].completion) == ("question", "answer")
    write_rows(tmp_path / "train.jsonl", [{**row, "text": "x"} for row in sums(8)])
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec
    with pytest.raises(TenureError, match=r"spec.yaml:\d+: data.train\[0\]: .*the columns fit several forms"):
        load_spec(path)


def test_a_recognised_form_must_suit_the_objective(tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tmp_path)
    path.write_text(path.read_text().replace("    prompt: question\n    completion: answer\nsuites", "suites"))
    write_rows(tmp_path / "train.jsonl", [{"text": "x"}])
    with pytest.raises(TenureError, match="objective sft cannot learn from rows of the form text"):
        load_spec(path)


def turns(*pairs: tuple[str, str], key: str = "from", value: str = "value") -> dict[str, Any]:
    return {"conversations": [{key: role, value: content} for role, content in pairs]}


def test_sharegpt_s_calls_and_observations_become_tool_turns(tmp_path: Path) -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = turns(("human", "1+1"), ("function_call", call), ("observation", "2"), ("gpt", "It is 2."))
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {}}}]
    (example,) = rows_of(tmp_path, {**row, "tools": json.dumps(tools)})
    assert isinstance(example, Conversation)
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert example.tools[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ((("human", "1"), ("human", "2"), ("gpt", "3")), "turn 2 is out of order: user after user"),
        ((("human", "1"), ("system", "2"), ("gpt", "3")), "turn 2 is out of order: system after user"),
        ((("human", "1"), ("gpt", "2"), ("gpt", "3")), "turn 3 is out of order: assistant after assistant"),
        ((("human", "1"), ("tool", "2"), ("gpt", "3")), "turn 2 is out of order: tool after user"),
        ((("human", "1"), ("gpt", "2"), ("human", "3")), "there is nothing to learn"),
        ((("alien", "1"), ("gpt", "2")), "the role 'alien' is unknown"),
        ((("human", "1"), ("function_call", "{"), ("gpt", "2")), "a function_call is no JSON"),
    ],
)
def test_turns_that_make_no_conversation_are_named_or_dropped(
    tmp_path: Path, pairs: tuple[tuple[str, str], ...], what: str
) -> None:
    good = turns(("human", "1"), ("gpt", "2"))
    assert refusal(tmp_path, good, turns(*pairs)).startswith(f"/rows.jsonl row 2: {what}")
    faults = Faults(drop=True)
    kept = list(examples(Source(path=tmp_path / "rows.jsonl"), faults))
    assert (len(kept), faults.count, faults.first[0].where) == (1, 1, f"{tmp_path / 'rows.jsonl'} row 2")


def test_a_pair_whose_prompts_differ_is_refused(tmp_path: Path) -> None:
    row = {"chosen": TURNS, "rejected": [{**TURNS[0], "content": "1+2"}, {**TURNS[1], "content": "3"}]}
    assert "row 1: the turns before the chosen and the rejected answer differ" in refusal(tmp_path, row)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "tool_calls", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
columns = st.sampled_from(["prompt", "answer", "messages", "conversations", "chosen", "rejected", "text", "tools"])


@settings(deadline=None, database=None, max_examples=200)
@given(st.lists(st.dictionaries(columns, values, max_size=4), min_size=1, max_size=3), st.data())
def test_any_values_give_examples_or_named_faults(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    forms: list[dict[str, str]] = [
        {},
        {"prompt": "prompt", "completion": "answer"},
        {"messages": "messages"},
        {"messages": "conversations"},
        {"chosen": "chosen", "rejected": "rejected"},
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        {"text": "text"},
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", rows)
        try:
            assert list(examples(Source(path=path, **data.draw(st.sampled_from(forms))))) is not None
        except TenureError as error:
            assert all(problem.where.startswith(str(path)) for problem in error.problems)  # noqa: PT017


def test_rows_that_cannot_be_read_do_not_decide_the_form(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{\n{"question": "1+1", "answer": "2"}\n')
    assert recognise(path) == {"prompt": "question", "completion": "answer"}
    path.write_text('{"question": null, "answer": "2"}\n{"question": "1+1", "answer": "2"}\n{"answer": "3"}\n')
    assert recognise(path) == {"prompt": "question", "completion": "answer"}
    faults = Faults(drop=True)
    assert len(list(examples(Source(path=path), faults))) == 1
    assert [problem.where for problem in faults.first] == [f"{path} row 1", f"{path} row 3"]
    path.write_text("{\n")
    with pytest.raises(TenureError, match=r"rows\.jsonl row 1: not valid JSON"):
        recognise(path)


ALPACA = {"instruction": "Add.", "input": "3+4", "output": "7"}
TALK = {"conversations": [{"from": "human", "value": "3+4"}, {"from": "gpt", "value": "7"}]}


@pytest.mark.parametrize(
    ("metric", "row", "item"),
    [
        ("exact_match", ALPACA, ("Add.\n\n3+4", "7")),
        ("exact_match", TALK, ("3+4", "7")),
        ("exact_match", {"question": "3+4", "answer": "7"}, ("3+4", "7")),
        ("cross_entropy", {"text": "seven"}, ("", "seven")),
        ("cross_entropy", ALPACA, ("Add.\n\n3+4", "7")),
        ("perplexity", TALK, ("3+4", "7")),
    ],
)
def test_a_suites_columns_are_recognised_as_a_sources(
    tmp_path: Path, metric: str, row: dict[str, Any], item: tuple[str, str]
) -> None:
    suite = looked_at(tmp_path, metric, row)
    (found,) = read_items(suite)
    assert (found.prompt, found.completion) == item
    again = SUITE.validate_python(suite.model_dump(mode="json"))
    assert again == suite


@pytest.mark.parametrize(
    ("metric", "row", "what"),
    [
        ("exact_match", {"text": "seven"}, "the rows' text make no item of the metric exact_match"),
        ("rouge", {"prompt": "a", "chosen": "b", "rejected": "c"}, "the rows' chosen, rejected make no item"),
        ("exact_match", {"a": 1}, "the columns fit no form: a"),
    ],
)
def test_a_suite_of_another_form_is_refused(tmp_path: Path, metric: str, row: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        looked_at(tmp_path, metric, row)


SUITE: TypeAdapter[Any] = TypeAdapter(Suite)


def looked_at(folder: Path, metric: str, row: dict[str, Any]) -> Any:
    write_rows(folder / "items.jsonl", [row])
    given = {"name": "s", "path": "items.jsonl", "metric": metric}
    return SUITE.validate_python(given, context={"folder": folder, "look_at_files": True})
