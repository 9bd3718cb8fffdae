"""Turns and tools of a row: the forms that are taken, and each fault by its turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from training.data.readers import RowFault
from training.data.turns import checked_tools, checked_turns

ASK = {"role": "user", "content": "3+4?"}
ANSWER = {"role": "assistant", "content": "7"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}


def checked(*turns: Any) -> tuple[dict[str, Any], ...]:
    return checked_turns(list(turns), "turns", "turns, tools")


def test_what_a_template_may_read_is_kept_and_nothing_else() -> None:
    kept = {"reasoning_content": "so", "weight": 0, "name": "ada"}
    assert checked(ASK | {"name": "bo", "id": 7, "weight": None}, ANSWER | kept | {"extra": 1}) == (
        ASK | {"name": "bo"},
        ANSWER | kept,
    )


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_by_one_name(key: str) -> None:
    assert checked(ASK, ANSWER | {key: "so"})[1]["reasoning_content"] == "so"


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "3+"}, {"type": "text", "text": "4?"}]
    assert checked(ASK | {"content": parts}, ANSWER) == (ASK, ANSWER)


@pytest.mark.parametrize(
    "given",
    [
        CALL,
        {"name": "add", "arguments": {"a": 3}},
        {"function": {"name": "add", "arguments": '{"a": 3}'}},
        {"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": 3}, "strict": None}},
    ],
)
def test_calls_have_one_form_and_need_no_text(given: dict[str, Any]) -> None:
    told = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    turns = checked(ASK, {"role": "assistant", "content": None, "tool_calls": [given]}, told, ANSWER)
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert turns[2] == told
    assert checked(ASK, {"role": "assistant", "tool_calls": [given]})[1] == turns[1]


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ({"role": "assistant", "content": 7}, "turn 1 has no text as its content"),
        ({"role": "user", "content": [{"type": "image"}]}, "turn 1 holds a part of the type 'image'"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "turn 1, the user's, calls tools"),
        ({"role": "assistant", "tool_calls": "add"}, "the tool calls of turn 1 are no list"),
        ({"role": "assistant", "tool_calls": [7]}, "a int stands where a function is wanted"),
        ({"role": "assistant", "tool_calls": [{"function": 7}]}, "'function' is no object"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "of turn 1 names no function"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments are no JSON object: "),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, r"no JSON object \(turn 1\)"),
        ({"role": ["user"], "content": "a"}, "the role .* of turn 1 is unknown"),
        (None, "turn 1 is no object"),
    ],
)
def test_a_faulty_turn_is_named(turn: Any, what: str) -> None:
    with pytest.raises(RowFault, match=what):
        checked(turn, ANSWER)


def test_tools_may_be_json_and_have_one_form() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    for given in ([tool], [tool["function"]], json.dumps([tool])):
        assert checked_tools(given, "tools") == (tool,)
    assert checked_tools(None, "tools") == checked_tools([], "tools") == checked_tools("", "tools") == ()


@pytest.mark.parametrize("given", ["[", "7", {"name": "add"}, [7], [{"function": "add"}], [{"name": 7}]])
def test_faulty_tools_are_refused(given: Any) -> None:
    with pytest.raises(RowFault):
        checked_tools(given, "tools")
