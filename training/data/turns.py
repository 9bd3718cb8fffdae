"""Checks a row's chat turns and tools, and brings them into the one form that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from training.data.readers import RowFault

ROLES = ("system", "user", "assistant", "tool")
Messages = tuple[dict[str, Any], ...]
_KEPT = ("name", "tool_call_id", "reasoning_content", "weight")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def checked_turns(given: Any, column: str, columns: str) -> Messages:
    """The turns of a row, of which the last is the assistant's.

    Args:
        given: the column's value: a list of turns as in OpenAI's API.
        columns: the row's columns, for the message.

    Raises:
        RowFault: it is no such list, a turn has no known role or no text, or the last turn is not a filled assistant's.
    """
    if not isinstance(given, list) or not given:
        raise RowFault(f"'{column}' is no list of turns", f"columns here: {columns}")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(given, start=1))
    if turns[-1]["role"] != "assistant" or not (turns[-1]["content"].strip() or turns[-1].get("tool_calls")):
        raise RowFault("there is nothing to learn: the last turn is not a filled assistant turn", "end with one")
    return turns


def checked_tools(given: Any, column: str) -> Messages:
    """The functions that may be called, as JSON Schema; a list, or its JSON text. None is none.

    Raises:
        RowFault: it is no list of functions.
    """
    value = _from_json(given, f"'{column}' is no JSON") if isinstance(given, str) and given.strip() else given
    if not value:
        return ()
    tools = tuple(_function(tool) for tool in value) if isinstance(value, list) else ()
    if not tools or not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise RowFault(f"'{column}' is no list of functions", _TOOL)
    return tools


_TOOL = 'write [{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}]'
_CALL = 'write "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowFault(f"turn {number} is no object with role and content", 'write {"role": "user", "content": "..."}')
    role = turn.get("role")
    if role not in ROLES:
        raise RowFault(f"the role {role!r} of turn {number} is unknown", f"known: {', '.join(ROLES)}")
    calls = _calls(turn.get("tool_calls"), role, number)
    made = {"role": role, "content": _text(turn.get("content", "" if calls else None), bool(calls), number)}
    reasoning = next((turn[key] for key in _REASONING if isinstance(turn.get(key), str) and turn[key]), None)
    kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    kept |= {"reasoning_content": reasoning} if reasoning else {}
    return made | kept | ({"tool_calls": calls} if calls else {})


def _text(content: Any, has_calls: bool, number: int) -> str:
    """A turn's text, from a text or from a list of parts of the type text."""
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and content:
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise RowFault(f"turn {number} has no text as its content", 'write {"role": "user", "content": "..."}')
    return content


def _part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RowFault(f"turn {number} holds a part of the type {kind!r}; text alone can be learned", "remove it")
    return str(part["text"])


def _calls(given: Any, role: str, number: int) -> list[dict[str, Any]]:
    if not given:
        return []
    if role != "assistant":
        raise RowFault(f"turn {number}, the {role}'s, calls tools: the assistant alone does", "move its tool_calls")
    calls = [_function(call) for call in given] if isinstance(given, list) else []
    if not calls:
        raise RowFault(f"the tool calls of turn {number} are no list", _CALL)
    for call in calls:
        if not isinstance(call["function"].get("name"), str):
            raise RowFault(f"a tool call of turn {number} names no function", _CALL)
        arguments = call["function"].get("arguments") or {}
        value = _from_json(arguments, _NO_OBJECT) if isinstance(arguments, str) else arguments
        if not isinstance(value, dict):
            raise RowFault(f"{_NO_OBJECT} (turn {number})", _CALL)
        call["function"]["arguments"] = value
    return calls


_NO_OBJECT = "a tool call's arguments are no JSON object"


def _function(given: Any) -> dict[str, Any]:
    """A tool or a call as {"type": "function", "function": {...}}; some write the inner object alone."""
    if not isinstance(given, dict):
        raise RowFault(f"a {type(given).__name__} stands where a function is wanted", _TOOL)
    inner = given.get("function", given)
    if not isinstance(inner, dict):
        raise RowFault("'function' is no object", _TOOL)
    bare = {key: value for key, value in inner.items() if value is not None}
    outer = {key: value for key, value in given.items() if value is not None} if "function" in given else {}
    return {"type": "function", **outer, "function": bare}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{what}: {error}", "write valid JSON") from None
