"""Turns the rows of a suite's file into test items, naming the row of every fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

from training.data.row import Row, RowFault
from training.data.rows import Faults, non_empty, rows_of, turns_of
from training.data.shapes import as_messages
from training.data.templating import column_of, fill, fill_text
from training.data.turns import Messages
from training.suite_spec import Accuracy, Answering, Classification, CrossEntropy, FileSuite, GreedyMatch, Perplexity


@dataclass(frozen=True)
class SuiteItem:
    """One test item. `choices` and `right` belong to accuracy, `completion` to the other metrics.

    `turns` are the chat turns before the answer, where the row is a chat; `prompt` is then the last of them.
    """

    prompt: str
    completion: str
    where: str
    system: str = ""
    choices: tuple[str, ...] = ()
    right: int = -1
    turns: Messages = ()


@dataclass(frozen=True)
class Answered:
    """An item's answer, its score, and its weight in the suite's mean (bytes for cross-entropy, tokens for perplexity).

    `chance` is what a guess would score, `readable` whether the metric found in the answer what it looks for, `part`
    the task of a group that the item belongs to.
    """

    prompt: str
    expected: str
    answer: str
    score: float
    weight: float
    chance: float = 0.0
    readable: bool = True
    part: str | None = None


def read_items(suite: FileSuite) -> list[SuiteItem]:
    """The items of a suite (the first `limit` of them), or every row's fault at once."""
    reader = _READERS[type(suite)]
    faults = Faults()
    items = rows_of(suite.path, lambda row, where: reader(suite, row, where), faults)
    taken = list(islice(items, suite.limit))
    faults.close()
    return taken


def _answered_item(suite: Answering, row: Row, where: str) -> SuiteItem:
    if suite.messages is not None:
        return _chat_item(suite.messages, row, where)
    assert suite.prompt is not None
    system = fill_text(suite.system, row) if suite.system else ""
    completion = non_empty(suite.completion, row) if suite.completion is not None else ""
    return SuiteItem(fill(suite.prompt, row), completion, where, system)


def _classified_item(suite: Classification, row: Row, where: str) -> SuiteItem:
    item = _answered_item(suite, row, where)
    known = {label.casefold() for label in suite.labels}
    if item.completion.strip().casefold() not in known:
        what = f"the right answer {item.completion!r} is none of the labels {list(suite.labels)}"
        raise RowFault(what, "add it to labels, or mend the row")
    return item


def _likelihood_item(suite: CrossEntropy | Perplexity, row: Row, where: str) -> SuiteItem:
    if suite.text is not None:
        return SuiteItem("", non_empty(suite.text, row), where)
    if suite.messages is not None:
        return _chat_item(suite.messages, row, where)
    assert suite.prompt is not None
    assert suite.completion is not None
    return SuiteItem(fill(suite.prompt, row), non_empty(suite.completion, row), where)


def _chat_item(column: str, row: Row, where: str) -> SuiteItem:
    """Chat turns: the last one is the right answer, what comes before is asked."""
    *before, last = turns_of(as_messages(row.get(column)), column, row)
    if not before:
        raise RowFault(f"'{column}' holds an answer and nothing before it", "start with a user's turn")
    return SuiteItem(str(before[-1]["content"]), str(last["content"]), where, turns=tuple(before))


def _choice_item(suite: Accuracy, row: Row, where: str) -> SuiteItem:
    choices = suite.choices if isinstance(suite.choices, tuple) else column_of(suite.choices, row)
    if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise RowFault(f"the choices are no list of two or more texts: {choices!r}")
    answer = column_of(suite.answer, row)
    right = answer if isinstance(answer, int) and not isinstance(answer, bool) else _index_of(str(answer), choices)
    if not 0 <= right < len(choices):
        raise RowFault(f"the answer {right} is no index into {len(choices)} choices", "indices start at 0")
    return SuiteItem(fill(suite.prompt, row), choices[right], where, choices=tuple(choices), right=right)


def _index_of(answer: str, choices: list[str] | tuple[str, ...]) -> int:
    if answer not in choices:
        raise RowFault(f"the answer {answer!r} is none of the choices {list(choices)}", "give its text or its index")
    return choices.index(answer)


_READERS: dict[type, Callable[[Any, Row, str], SuiteItem]] = {
    **dict.fromkeys(get_args(Answering), _answered_item),
    Classification: _classified_item,
    GreedyMatch: _answered_item,
    Accuracy: _choice_item,
    CrossEntropy: _likelihood_item,
    Perplexity: _likelihood_item,
}
