"""Reads JSONL rows and turns them into prompts and completions, naming the row of every fault."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.errors import Problem, TenureError, raise_all
from training.section import Source
from training.spec import Accuracy, CrossEntropy, ExactMatch
from training.strategy import Prompts

MAX_PROBLEMS = 20
ROLES = ("system", "user", "assistant", "tool")
Row = dict[str, Any]
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """A training example: chat turns, of which the assistant's are learned, or a plain prompt and completion."""

    messages: Messages
    where: str


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer to prefer and the one to avoid: two conversations that differ in their last turn."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class Passage:
    """Plain text, of which every token is learned."""

    text: str
    where: str


@dataclass(frozen=True)
class SuiteItem:
    """One test item. `choices` and `right` belong to accuracy, `completion` to the other metrics."""

    prompt: str
    completion: str
    where: str
    system: str = ""
    choices: tuple[str, ...] = ()
    right: int = -1


class RowFault(Exception):
    """What is wrong with one row, and what to do; the reader adds file and row."""

    def __init__(self, what: str, instead: str = "") -> None:
        super().__init__(what)
        self.what, self.instead = what, instead


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row's place ("FILE row N", from 1) and its object.

    Raises:
        TenureError: the first row that is not UTF-8 or not a JSON object, or a file without rows.
    """
    for where, line in _lines(path):
        try:
            row = _parse(line)
        except RowFault as fault:
            raise TenureError(Problem(fault.what, where, fault.instead)) from None
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line that is not blank, with its place; a byte order mark at the start of the file is passed over."""
    count = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                count += 1
                yield f"{path} row {number}", text.rstrip(b"\r\n")
    if not count:
        raise TenureError(Problem("the file holds no rows", str(path), "write one JSON object per line"))


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
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


def read_conversations(source: Source) -> list[Conversation]:
    """All training examples of a source, or every row's fault at once (the first twenty)."""
    return _read_all(source.path, lambda row, where: Conversation(_messages(source, row), where))


def read_preferences(source: Source) -> list[Preference]:
    """All pairs of a source of the form preference, or every row's fault at once (the first twenty)."""
    return _read_all(source.path, lambda row, where: _preference(source, row, where))


def read_passages(source: Source) -> list[Passage]:
    """All texts of a source of the form text, or every row's fault at once (the first twenty)."""
    column = source.text
    assert column is not None
    return _read_all(source.path, lambda row, where: Passage(_non_empty(column, row), where))


def read_prompts(prompts: Prompts) -> list[Conversation]:
    """The turns before an answer of every row of a file of prompts, or every row's fault at once."""

    def build(row: Row, where: str) -> Conversation:
        system = ({"role": "system", "content": fill_text(prompts.system, row)},) if prompts.system else ()
        return Conversation((*system, {"role": "user", "content": _filled(prompts.prompt, row)}), where)

    return _read_all(prompts.path, build)


def _filled(column: str, row: Row) -> str:
    text = fill(column, row)
    if not text.strip():
        raise RowFault(f"'{column}' is empty: there is nothing to answer", "fill or remove the row")
    return text


def read_items(suite: ExactMatch | Accuracy | CrossEntropy) -> list[SuiteItem]:
    """The items of a suite (the first `limit` of them), or every row's fault at once."""
    readers: dict[type, Any] = {ExactMatch: _exact_item, Accuracy: _choice_item, CrossEntropy: _entropy_item}
    reader = readers[type(suite)]
    return _read_all(suite.path, lambda row, where: reader(suite, row, where), suite.limit)


def _read_all(path: Path, build: Any, limit: int | None = None) -> list[Any]:
    built: list[Any] = []
    problems: list[Problem] = []
    for where, line in _lines(path):
        try:
            built.append(build(_parse(line), where))
        except RowFault as fault:
            problems.append(Problem(fault.what, where, fault.instead))
        if len(problems) == MAX_PROBLEMS or (limit is not None and len(built) == limit):
            break
    raise_all(problems)
    return built


def _messages(source: Source, row: Row) -> Messages:
    if source.messages is not None:
        return _checked_turns(row, source.messages)
    assert source.completion is not None
    return (*_prompt_turns(source, row), {"role": "assistant", "content": _non_empty(source.completion, row)})


def _prompt_turns(source: Source, row: Row) -> Messages:
    assert source.prompt is not None
    system = ({"role": "system", "content": fill_text(source.system, row)},) if source.system else ()
    return (*system, {"role": "user", "content": fill(source.prompt, row)})


def _preference(source: Source, row: Row, where: str) -> Preference:
    assert source.chosen is not None
    assert source.rejected is not None
    prompt = _prompt_turns(source, row)
    chosen, rejected = _non_empty(source.chosen, row), _non_empty(source.rejected, row)
    if chosen == rejected:
        raise RowFault("the chosen and the rejected answer are the same: the pair teaches nothing", "remove the row")
    answers = ((*prompt, {"role": "assistant", "content": answer}) for answer in (chosen, rejected))
    return Preference(*(Conversation(messages, where) for messages in answers))


def _checked_turns(row: Row, column: str) -> Messages:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"'{column}' is no list of turns", f"columns here: {', '.join(row)}")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise RowFault("a turn is no object with role and content", 'write {"role": "user", "content": "..."}')
        if turn.get("role") not in ROLES:
            raise RowFault(f"the role {turn.get('role')!r} is unknown", f"known: {', '.join(ROLES)}")
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise RowFault("there is nothing to learn: the last turn is not a filled assistant turn", "end with one")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _exact_item(suite: ExactMatch, row: Row, where: str) -> SuiteItem:
    system = fill_text(suite.system, row) if suite.system else ""
    return SuiteItem(fill(suite.prompt, row), _non_empty(suite.completion, row), where, system)


def _entropy_item(suite: CrossEntropy, row: Row, where: str) -> SuiteItem:
    if suite.text is not None:
        return SuiteItem("", _non_empty(suite.text, row), where)
    assert suite.prompt is not None
    assert suite.completion is not None
    return SuiteItem(fill(suite.prompt, row), _non_empty(suite.completion, row), where)


def _choice_item(suite: Accuracy, row: Row, where: str) -> SuiteItem:
    choices = suite.choices if isinstance(suite.choices, tuple) else _column(suite.choices, row)
    if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise RowFault(f"the choices are no list of two or more texts: {choices!r}")
    answer = _column(suite.answer, row)
    right = answer if isinstance(answer, int) and not isinstance(answer, bool) else _index_of(str(answer), choices)
    if not 0 <= right < len(choices):
        raise RowFault(f"the answer {right} is no index into {len(choices)} choices", "indices start at 0")
    return SuiteItem(fill(suite.prompt, row), choices[right], where, choices=tuple(choices), right=right)


def _index_of(answer: str, choices: list[str] | tuple[str, ...]) -> int:
    if answer not in choices:
        raise RowFault(f"the answer {answer!r} is none of the choices {list(choices)}", "give its text or its index")
    return choices.index(answer)


def _column(name: str, row: Row) -> Any:
    if name not in row:
        raise RowFault(f"there is no column '{name}'", f"columns here: {', '.join(row)}")
    return row[name]


def _non_empty(column: str, row: Row) -> str:
    text = fill(column, row)
    if not text.strip():
        raise RowFault(f"'{column}' is empty: there is no target token to learn or score", "fill or remove the row")
    return text


def fill(column: str, row: Row) -> str:
    """The text of a column, or of a Jinja template over the columns when it holds `{{`."""
    if "{{" in column:
        return _fill_template(column, row)
    value = _column(column, row)
    if not isinstance(value, str):
        raise RowFault(f"'{column}' is {type(value).__name__}, not text", "quote it, or use a template")
    return value


def fill_text(text: str, row: Row) -> str:
    """A text as it stands, or filled with columns where it holds `{{`."""
    return _fill_template(text, row) if "{{" in text else text


def _fill_template(source: str, row: Row) -> str:
    try:
        return _template(source).render(row)
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        reason = str(error) or type(error).__name__
        raise RowFault(f"the template {source!r} failed: {reason}", f"columns here: {', '.join(row)}") from None


# What an expression over a row's values can raise beside Jinja's own errors.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@lru_cache(maxsize=64)
def _template(source: str) -> Template:
    """A sandboxed template; without Jinja's globals (range among them) it can only loop over what a row holds."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals.clear()
    return environment.from_string(source)
