"""The pieces that scoring and validation share: how an item of a suite is rendered and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.encoding import Encoded, render_prompt, wants_chat
from training.rows import SuiteItem
from training.spec import Accuracy, CrossEntropy, ExactMatch

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


def spaced(prompt: str, completion: str) -> str:
    """A plain completion with the space that parts it from its prompt, unless one of them brings its own."""
    needs = bool(prompt) and not prompt[-1].isspace() and not completion[:1].isspace()
    return f" {completion}" if needs else completion


def render_item(suite: AnySuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase) -> RenderedItem:
    """The rendered item, by the chat template where the suite asks for it."""
    if wants_chat(suite.chat, tokenizer, item.where):
        system = [{"role": "system", "content": item.system}] if item.system else []
        prompt = render_prompt(tokenizer, [*system, {"role": "user", "content": item.prompt}])
        return RenderedItem(prompt, item.completion, item.choices, item.right)
    prompt = f"{item.system}\n{item.prompt}" if item.system else item.prompt
    choices = tuple(spaced(prompt, choice) for choice in item.choices)
    return RenderedItem(prompt, spaced(prompt, item.completion), choices, item.right)


def encode_item(suite: AnySuite, item: SuiteItem, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Token ids of an item with loss on its right answer, cut on the left to max_length."""
    rendered = render_item(suite, item, tokenizer)
    chat = wants_chat(suite.chat, tokenizer, item.where)
    prompt = tokenizer(rendered.prompt, add_special_tokens=not chat)["input_ids"] if rendered.prompt else []
    answer = tokenizer(rendered.target, add_special_tokens=False)["input_ids"]
    if chat and suite.metric == "exact_match" and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = [*prompt, *answer]
    is_target = [False] * len(prompt) + [True] * len(answer)
    return Encoded(tuple(ids[-max_length:]), tuple(is_target[-max_length:]))
