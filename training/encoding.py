"""Turns conversations into token ids with the loss on the assistant's tokens alone.

Prompt and completion are tokenised apart, so the prompt's ids in training are the ids that serving sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from training.errors import Problem, TenureError, fail
from training.rows import Conversation, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and, for each, whether it carries loss."""

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    @property
    def num_targets(self) -> int:
        return sum(self.is_target)


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text and whether it is to be learned."""

    text: str
    is_target: bool


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, with a pad token (the end token where it has none).

    Raises:
        TenureError: it cannot be read, or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().splitlines()[0]
        raise fail(f"the tokenizer cannot be read: {reason}", str(folder), "save it beside the model again") from None
    if tokenizer.eos_token_id is None:
        raise fail("the tokenizer has no end token", str(folder), "set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def wants_chat(chat: bool | str, tokenizer: PreTrainedTokenizerBase, where: str) -> bool:
    """Whether prompts are rendered by the chat template.

    Raises:
        TenureError: chat is asked for and the model has no chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if chat is True and not has_template:
        raise fail("chat is asked for, but the model has no chat template", where, _NO_TEMPLATE)
    return has_template if chat == "auto" else bool(chat)


_NO_TEMPLATE = "use an instruct model, put a chat_template.jinja beside its tokenizer, or give prompt and completion"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str) -> str:
    """The chat template's text up to and including the header of the assistant's next turn."""
    return _render(tokenizer, messages, where, add_generation_prompt=True)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str, *, add_generation_prompt: bool
) -> str:
    """Rendered turns.

    Raises:
        TenureError: the template refuses them; many take no system turn, or want users and assistants in turns.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        what = f"the model's chat template refuses the turns {roles}: {error}"
        raise fail(what, where, "give other turns, or another chat_template.jinja beside the model") from None
    assert isinstance(text, str)
    return text


def segments(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, chat: bool) -> list[Segment]:
    """The rendered conversation, cut where learning starts and stops.

    Raises:
        TenureError: the template refuses the conversation, or does not render it as an extension of its own prefix.
    """
    messages = conversation.messages
    if not chat:
        end = tokenizer.eos_token or ""
        prompt = _plain_prompt(messages)
        return [Segment(prompt, False), Segment(spaced(prompt, messages[-1]["content"]) + end, True)]
    cut: list[Segment] = []
    done = ""
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            prompt = render_prompt(tokenizer, messages[:index], conversation.where)
            full = _render(tokenizer, messages[: index + 1], conversation.where, add_generation_prompt=False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                what = "the chat template rewrites earlier turns, so the learned span cannot be told"
                raise fail(what, conversation.where, "give single-turn rows, or another chat template")
            answer = _until_end_token(full[len(prompt) :], tokenizer.eos_token)
            cut += [Segment(prompt[len(done) :], False), Segment(answer, True)]
            done = prompt + answer
    return cut


def _plain_prompt(messages: Messages) -> str:
    return "\n".join(turn["content"] for turn in messages[:-1])


def spaced(prompt: str, completion: str) -> str:
    """A plain completion with the space that parts it from its prompt, unless one of them brings its own."""
    needs = bool(prompt) and not prompt[-1].isspace() and not completion[:1].isspace()
    return f" {completion}" if needs else completion


def _until_end_token(text: str, end: str | None) -> str:
    """An answer up to and including its end token: what the template writes after it is never generated."""
    return text[: text.rindex(end) + len(end)] if end and end in text else text


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, chat: bool) -> Encoded:
    """Token ids and loss mask of one conversation. A plain prompt gets the tokenizer's own start tokens."""
    ids: list[int] = []
    is_target: list[bool] = []
    for position, segment in enumerate(segments(tokenizer, conversation, chat)):
        with_start = position == 0 and not chat
        piece = prompt_ids(tokenizer, segment.text) if with_start else text_ids(tokenizer, segment.text)
        ids += piece
        is_target += [segment.is_target] * len(piece)
    return Encoded(tuple(ids), tuple(is_target))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of rendered text, or of an answer: nothing is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a plain prompt: the tokenizer's own start tokens and the text, without the end that some add."""
    bare = text_ids(tokenizer, _ANY_TEXT)
    started = list(tokenizer(_ANY_TEXT)["input_ids"])
    return started[: started.index(bare[0])] + text_ids(tokenizer, text)


_ANY_TEXT = "a"


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat: bool,
    max_length: int,
    overlong: str,
) -> tuple[list[Encoded], int]:
    """All examples encoded, and how many were longer than max_length (dropped or truncated as asked).

    Raises:
        TenureError: rows are longer and overlong is "refuse", or a row has no target token.
    """
    encoded = [encode(tokenizer, conversation, chat) for conversation in conversations]
    longer = [i for i, example in enumerate(encoded) if len(example.ids) > max_length]
    if longer and overlong == "refuse":
        longest = max(len(encoded[i].ids) for i in longer)
        what = f"{len(longer)} rows are longer than max_length {max_length} (the longest has {longest} tokens)"
        instead = f"set training.max_length: {longest}, or data.overlong: drop (or truncate)"
        raise TenureError(Problem(what, conversations[longer[0]].where, instead))
    if overlong == "drop":
        drop = set(longer)
        kept = [(c, e) for i, (c, e) in enumerate(zip(conversations, encoded, strict=True)) if i not in drop]
    else:
        cut = [Encoded(e.ids[:max_length], e.is_target[:max_length]) for e in encoded]
        kept = list(zip(conversations, cut, strict=True))
    empty = [c.where for c, e in kept if not e.num_targets]
    if empty:
        what = "no target token is left to learn" + (f" ({len(empty)} rows like this)" if len(empty) > 1 else "")
        raise TenureError(Problem(what, empty[0], "fill the completion, or raise training.max_length"))
    return [example for _, example in kept], len(longer)
