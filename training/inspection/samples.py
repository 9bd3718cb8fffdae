"""One view of every row, whatever its form: what is read, and what is learned or expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from training.items import SuiteItem, read_items
from training.rows import Conversation, Example, Passage, Preference, examples
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
    """Every row of a source, as it is asked for.

    Raises:
        TenureError: every row's fault at once.
    """
    return map(sample_of, examples(source))


def sample_of(example: Example) -> Sample:
    """A training example as a sample."""
    if isinstance(example, Passage):
        return Sample(example.where, "", example.text)
    return _of_preference(example) if isinstance(example, Preference) else _of_conversation(example)


def read_suite(suite: FileSuite) -> Iterator[Sample]:
    """Every item of a suite, up to its limit.

    Raises:
        TenureError: every row's fault at once.
    """
    return map(sample_of_item, read_items(suite))


def _of_conversation(conversation: Conversation) -> Sample:
    return Sample(
        conversation.where,
        prompt=_said_by(conversation, "user", "tool"),
        answer=_said_by(conversation, "assistant"),
        system=_said_by(conversation, "system"),
    )


def _said_by(conversation: Conversation, *roles: str) -> str:
    return "\n".join(turn.get("content") or "" for turn in conversation.messages if turn["role"] in roles)


def _of_preference(pair: Preference) -> Sample:
    chosen = _of_conversation(pair.chosen)
    rejected = _said_by(pair.rejected, "assistant")
    return Sample(chosen.where, chosen.prompt, chosen.answer, chosen.system, rejected)


def sample_of_item(item: SuiteItem) -> Sample:
    """A suite's item as a sample; its answer is the one that is right."""
    return Sample(item.where, item.prompt, item.completion, item.system)
