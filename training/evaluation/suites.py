"""The pieces that scoring and validation share: how an item of a suite is rendered and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.data.encoding import Encoded, encode_many, spaced, wants_chat
from training.data.items import SuiteItem
from training.data.rendering import render_prompt
from training.data.rows import Conversation, Faults
from training.data.tokens import continued_ids, prompt_ids, text_ids
from training.suite_spec import Accuracy, Answering, FileSuite, GreedyMatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedItem:
    """An item as the model sees it: the whole prompt, and what may follow it."""

    prompt: str
    target: str
    choices: tuple[str, ...]
    right: int


def render_item(suite: FileSuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase) -> RenderedItem:
    """The rendered item, by the chat template where the suite asks for it."""
    if is_chat(suite, tokenizer, item.where):
        prompt = render_prompt(tokenizer, _conversation(item).messages[:-1], item.where)
        return RenderedItem(prompt, item.completion, item.choices, item.right)
    prompt = f"{item.system}\n{item.prompt}" if item.system else item.prompt
    choices = tuple(spaced(prompt, choice) for choice in item.choices)
    return RenderedItem(prompt, spaced(prompt, item.completion), choices, item.right)


def _conversation(item: SuiteItem) -> Conversation:
    system = ({"role": "system", "content": item.system},) if item.system else ()
    asked = item.turns or (*system, {"role": "user", "content": item.prompt})
    return Conversation((*asked, {"role": "assistant", "content": item.completion}), item.where)


def is_chat(suite: FileSuite, tokenizer: PreTrainedTokenizerBase, where: str) -> bool:
    """Whether the suite's prompts are rendered by the chat template; those that are chat turns always are.

    Raises:
        TenureError: they are to be, and the model has none.
    """
    turns = not isinstance(suite, Accuracy) and suite.messages is not None
    return wants_chat(True if turns else suite.chat, tokenizer, where)


def encode_item(suite: FileSuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Token ids of an item with loss on its right answer, cut on the left to max_length."""
    return encode_items(suite, [item], tokenizer, max_length)[0]


def encode_items(
    suite: FileSuite, items: Sequence[SuiteItem], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """encode_item() of every item; those that are trained on as they are asked, with few calls of the tokenizer."""
    answering = isinstance(suite, Answering | GreedyMatch)
    as_trained = [answering and not item.turns and is_chat(suite, tokenizer, item.where) for item in items]
    faults = Faults()
    taught = [_conversation(item) for item, is_taught in zip(items, as_trained, strict=True) if is_taught]
    encoded = iter(encode_many(tokenizer, taught, True, faults))
    faults.close()
    rows = [
        next(encoded) if is_taught else _rendered_row(suite, item, tokenizer, answering)
        for item, is_taught in zip(items, as_trained, strict=True)
    ]
    return [Encoded(row.ids[-max_length:], row.is_target[-max_length:]) for row in rows if row]


def _rendered_row(suite: FileSuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase, answering: bool) -> Encoded:
    rendered = render_item(suite, item, tokenizer)
    prompt = context_ids(suite, rendered.prompt, tokenizer)
    answer = continued_ids(tokenizer, rendered.target) if rendered.prompt else text_ids(tokenizer, rendered.target)
    if answering and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = [*prompt, *answer]
    is_target = [False] * len(prompt) + [True] * len(answer)
    return Encoded(tuple(ids), tuple(is_target))


@dataclass(frozen=True)
class Question:
    """What a model is to answer: the ids of a prompt, and how many tokens the answer may have."""

    ids: tuple[int, ...]
    max_new_tokens: int


def ask(
    suite: FileSuite, prompt: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, max_length: int
) -> Question:
    """A rendered prompt as a question; one that is too long is cut on the left, so that its answer has room."""
    ids = context_ids(suite, prompt, tokenizer)
    return Question(tuple(ids[-(max_length - max_new_tokens) :]), max_new_tokens)


def context_ids(suite: FileSuite, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a rendered prompt. Text without a prompt is scored from its first token on, after one start token."""
    if not prompt:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [] if start is None else [start]
    chat = is_chat(suite, tokenizer, suite.name)
    return text_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)
