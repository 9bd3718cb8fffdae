"""Recognises the form of rows by their columns, and brings turns as ShareGPT writes them into the form of messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from training.data.locations import Location
from training.data.readers import open_rows
from training.data.row import Row, RowFault
from training.data.turns import Messages
from training.errors import TenureError, fail

SAMPLED = 100
_FAULTS_TOLD = 20
PROMPTS = ("prompt", "question", "instruction", "input", "query", "problem")
COMPLETIONS = ("completion", "answer", "output", "response", "target", "solution")
_TURNS = ("messages", "conversations", "conversation")
_TEXTS = ("text", "content")
_SYSTEMS = ("system", "system_prompt")
_ALPACA = "{{ instruction }}{% if input is defined and input %}\n\n{{ input }}{% endif %}"
Fields = dict[str, str]


def recognise(location: Location) -> Fields:
    """The columns of a source whose spec names none, by the first hundred rows that can be read.

    Raises:
        TenureError: the columns fit no form or several, rows differ in form, or none can be read.
    """
    read = list(islice(open_rows(location), SAMPLED))
    rows = [(where, row) for where, row in read if not isinstance(row, RowFault)]
    if not rows:
        raise TenureError([row.at(where) for where, row in read if isinstance(row, RowFault)][:_FAULTS_TOLD])
    kinds = [{column: _kind(value) for column, value in row.items()} for _, row in rows]
    fitting = [one for one in kinds if list(_forms(one, set(one)))] or kinds  # the others are told, or dropped, as rows
    common = {column: kind for column, kind in fitting[0].items() if all(one.get(column) == kind for one in fitting)}
    anywhere = {column for one in fitting for column in one}
    found = list(_forms(common, anywhere))
    if len(found) == 1:
        return found[0]
    if found:
        told = "; or ".join(_told(fields) for fields in found)
        raise fail(f"the columns fit several forms: {told}", str(location), "name the columns of the one that is meant")
    odd = next((where for (where, _), one in zip(rows, kinds, strict=True) if not list(_forms(one, set(one)))), None)
    differ = next((where for (where, _), one in zip(rows, kinds, strict=True) if set(one) != set(kinds[0])), None)
    if odd is None and differ:
        what = "this row's columns are others than the first row's, and no form is common to all"
        raise fail(what, differ, "put each form into its own file")
    what = f"the columns fit no form: {', '.join(rows[0][1])}"
    raise fail(what, odd or str(location), f"name them in the source. Known by themselves are {_KNOWN}")


_KNOWN = (
    f"one of {', '.join(PROMPTS)} with one of {', '.join(COMPLETIONS)}; {', '.join(_TURNS)}; "
    f"chosen and rejected; {', '.join(_TEXTS)}"
)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "turns" if _as_list(value) else "other"


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return _as_list(value) is not None


def _as_list(value: Any) -> list[Any] | None:
    """The turns in a value; also where a table keeps them as one list for each key."""
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        columns = value.values()
        if len({len(part) for part in columns}) == 1:
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return value if {"role", "from"} & set(value[0]) else None
    return None


def _forms(common: dict[str, str], anywhere: set[str]) -> Iterator[Fields]:
    """Every form that the columns fit, as the fields of a source."""
    texts = [column for column, kind in common.items() if kind == "text"]
    turns = [column for column, kind in common.items() if kind == "turns"]
    system = next(({"system": f"{{{{ {name} | default('', true) }}}}"} for name in _SYSTEMS if name in anywhere), {})
    pair: Fields = {str(name): name for name in ("chosen", "rejected") if name in common and common[name] != "other"}
    prompts = [name for name in PROMPTS if name in texts or (len(pair) == 2 and name in turns)]
    answers = [name for name in COMPLETIONS if name in texts]
    if len(pair) == 2:
        yield from ({**pair, "prompt": name, **system} for name in prompts)
        if not prompts and common["chosen"] == common["rejected"] == "turns":
            yield pair
    elif "instruction" in prompts and "output" in answers and "input" in anywhere:
        yield {"prompt": _ALPACA, "completion": "output", **system}
    else:
        yield from ({"prompt": one, "completion": two, **system} for one in prompts for two in answers if one != two)
    yield from ({"messages": name} for name in _TURNS if name in turns)
    yield from ({"text": name} for name in _TEXTS if name in texts)


def _told(fields: Fields) -> str:
    return ", ".join(f"{key}: {value}" for key, value in fields.items())


def describe_source(source: Any) -> str:
    """The form of a source's rows and the columns that they are made from, given or recognised, in words."""
    keys = ("system", "prompt", "completion", "chosen", "rejected", "messages", "text")
    return f"{source.form} ({_told({key: getattr(source, key) for key in keys if getattr(source, key) is not None})})"


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def as_messages(value: Any) -> Any:
    """Turns with role and content; ShareGPT's are translated, and whatever is none is given back as it is.

    Raises:
        RowFault: a turn of ShareGPT has a role that is unknown, or calls a function in words that are no JSON.
    """
    turns = _as_list(value)
    return value if turns is None else [_translated(turn) if "from" in turn else turn for turn in turns]


def _translated(turn: Row) -> Row:
    role, text = turn["from"], turn.get("value")
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise RowFault(f"the role {role!r} is unknown", f"known: {', '.join(_SHAREGPT_ROLES)}")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(text)}
    return {"role": _SHAREGPT_ROLES[role], "content": text}


def _calls(text: Any) -> list[Any]:
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise RowFault(f"a function_call is no JSON: {error}", 'write {"name": "...", "arguments": {...}}') from None
    return calls if isinstance(calls, list) else [calls]


def check_order(turns: Messages) -> Messages:
    """The turns, when they follow each other as in a conversation.

    Raises:
        RowFault: a system turn is not the first, a role speaks twice in a row, or a tool answers no assistant.
    """
    before = None
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if (role == "system" and before) or (role == before and role != "tool"):
            raise RowFault(f"turn {number} is out of order: {role} after {before}", _ORDER)
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowFault(f"turn {number} is out of order: tool after {before or 'nothing'}", _ORDER)
        before = role
    return turns


_ORDER = "write system first, then user and assistant in turns, and tools' answers after the assistant's calls"


def recognised(source: Any) -> Any:
    """A source with the columns that were recognised, where it names none itself.

    Raises:
        TenureError: as recognise().
    """
    if source.form != "unknown":
        return source
    given = {key: getattr(source, key) for key in ("system",) if getattr(source, key) is not None}
    return source.model_copy(update={**recognise(source.path), **given})


def reason_of(error: TenureError) -> tuple[str, str]:
    """What and what instead of an error's first problem, its place before it."""
    first = error.problems[0]
    return f"{first.where}: {first.what}" if first.where else first.what, first.instead
