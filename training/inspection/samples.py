"""One view of every row, whatever its form: what is read, and what is learned or expected."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from training.data.chat import learned_turns
from training.data.items import SuiteItem, read_items
from training.data.rows import Conversation, Example, Faults, Passage, Preference, examples, place_of
from training.section import Source
from training.suite_spec import FileSuite


@dataclass(frozen=True)
class Sample:
    """A row or an item of a suite.

    `prompt` is what is only read, the turns of a conversation joined; `answer` is what is learned or expected: all of
    plain text, the turns that are learned, the chosen answer, the right choice. `system` stands apart, since rows share
    it.
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
    """Every row of a source that is not dropped, as it is asked for.

    Raises:
        TenureError: every row's fault at once.
    """
    faults = Faults(drop=source.faulty == "drop")
    for example in examples(source, faults):
        sample = faults.tried(place_of(example), sample_of, example)
        if sample:
            yield sample
    faults.close()


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
    learned = set(learned_turns(conversation))
    said: dict[str, list[str]] = {"system": [], "prompt": [], "answer": []}
    for place, turn in enumerate(conversation.messages):
        part = "system" if turn["role"] == "system" else "answer" if place in learned else "prompt"
        said[part].append(_said(turn))
    return Sample(conversation.where, **{part: "\n".join(texts) for part, texts in said.items()})


def _said(turn: Mapping[str, Any]) -> str:
    """A turn's text, and the calls that it makes as JSON."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join(part for part in (str(turn.get("content") or ""), calls) if part)


def _of_preference(pair: Preference) -> Sample:
    chosen = _of_conversation(pair.chosen)
    return Sample(
        chosen.where, chosen.prompt, chosen.answer, chosen.system, rejected=_of_conversation(pair.rejected).answer
    )


def sample_of_item(item: SuiteItem) -> Sample:
    """A suite's item as a sample; its answer is the one that is right."""
    return Sample(item.where, item.prompt, item.completion, item.system)
