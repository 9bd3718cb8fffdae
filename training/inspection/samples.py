"""One view of every row, whatever its form: what is read, and what is learned or expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from training.items import SuiteItem, read_items
from training.rows import Conversation, Preference, read_conversations, read_passages, read_preferences
from training.section import Source
from training.suite_spec import FileSuite


@dataclass(frozen=True)
class Sample:
    """A row or an item of a suite.

    `prompt` is what is only read, the turns of a conversation joined; `answer` is what is learned or expected: all of
    plain text, the assistant's turns, the chosen answer, the right choice. `system` stands apart, since rows share it.
    """

    where: str
    prompt: str
    answer: str
    system: str = ""
    rejected: str = ""

    @cached_property
    def text(self) -> str:
        """Prompt and answer, the answer that is avoided among them."""
        return "\n".join(part for part in (self.prompt, self.answer, self.rejected) if part)


def read_samples(source: Source) -> Iterator[Sample]:
    """Every row of a source.

    Raises:
        TenureError: every row's fault at once.
    """
    if source.form == "text":
        yield from (Sample(passage.where, "", passage.text) for passage in read_passages(source))
    elif source.form == "preference":
        yield from map(_of_preference, read_preferences(source))
    else:
        yield from map(_of_conversation, read_conversations(source))


def read_suite(suite: FileSuite) -> Iterator[Sample]:
    """Every item of a suite, up to its limit.

    Raises:
        TenureError: every row's fault at once.
    """
    return map(_of_item, read_items(suite))


def _of_conversation(conversation: Conversation) -> Sample:
    return Sample(
        conversation.where,
        prompt=_said_by(conversation, "user", "tool"),
        answer=_said_by(conversation, "assistant"),
        system=_said_by(conversation, "system"),
    )


def _said_by(conversation: Conversation, *roles: str) -> str:
    return "\n".join(turn["content"] for turn in conversation.messages if turn["role"] in roles)


def _of_preference(pair: Preference) -> Sample:
    chosen = _of_conversation(pair.chosen)
    rejected = _said_by(pair.rejected, "assistant")
    return Sample(chosen.where, chosen.prompt, chosen.answer, chosen.system, rejected)


def _of_item(item: SuiteItem) -> Sample:
    return Sample(item.where, item.prompt, item.completion, item.system)
