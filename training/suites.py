"""The pieces that scoring and validation share: how an item of a suite is rendered and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.chat import render_prompt
from training.encoding import Encoded, encode, spaced, wants_chat
from training.rows import Conversation, SuiteItem
from training.spec import Accuracy, CrossEntropy, ExactMatch
from training.tokens import continued_ids, prompt_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnySuite = ExactMatch | Accuracy | CrossEntropy


@dataclass(frozen=True)
class RenderedItem:
    """An item as the model sees it: the whole prompt, and what may follow it."""

    prompt: str
    target: str
    choices: tuple[str, ...]
    right: int


def render_item(suite: AnySuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase) -> RenderedItem:
    """The rendered item, by the chat template where the suite asks for it."""
    if wants_chat(suite.chat, tokenizer, item.where):
        prompt = render_prompt(tokenizer, _conversation(item).messages[:-1], item.where)
        return RenderedItem(prompt, item.completion, item.choices, item.right)
    prompt = f"{item.system}\n{item.prompt}" if item.system else item.prompt
    choices = tuple(spaced(prompt, choice) for choice in item.choices)
    return RenderedItem(prompt, spaced(prompt, item.completion), choices, item.right)


def _conversation(item: SuiteItem) -> Conversation:
    system = ({"role": "system", "content": item.system},) if item.system else ()
    turns = ({"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.completion})
    return Conversation((*system, *turns), item.where)


def encode_item(suite: AnySuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Token ids of an item with loss on its right answer, cut on the left to max_length."""
    if suite.metric == "exact_match" and wants_chat(suite.chat, tokenizer, item.where):
        row = encode(tokenizer, _conversation(item), chat=True)
        return Encoded(row.ids[-max_length:], row.is_target[-max_length:])
    rendered = render_item(suite, item, tokenizer)
    prompt = context_ids(suite, rendered.prompt, tokenizer)
    answer = continued_ids(tokenizer, rendered.target) if rendered.prompt else text_ids(tokenizer, rendered.target)
    if suite.metric == "exact_match" and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = [*prompt, *answer]
    is_target = [False] * len(prompt) + [True] * len(answer)
    return Encoded(tuple(ids[-max_length:]), tuple(is_target[-max_length:]))


def context_ids(suite: AnySuite, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a rendered prompt. Text without a prompt is scored from its first token on, after one start token."""
    if not prompt:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [] if start is None else [start]
    chat = wants_chat(suite.chat, tokenizer, suite.name)
    return text_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)
