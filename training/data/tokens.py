"""Text to token ids: alone, as a prompt, or as what follows other text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of rendered text: nothing is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a plain prompt: the tokenizer's own start tokens and the text, without the end that some add."""
    return _start_ids(tokenizer) + text_ids(tokenizer, text)


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of text that stands after other text: without the space that SentencePiece puts before a first word."""
    after_line, is_plain = _after_line(tokenizer)
    if is_plain:
        return text_ids(tokenizer, text)
    ids = text_ids(tokenizer, "\n" + text)
    return ids[len(after_line) :] if ids[: len(after_line)] == after_line else text_ids(tokenizer, text)


@lru_cache(maxsize=8)
def _after_line(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """The ids of a line's end, and whether text after it is encoded as it is alone."""
    after_line = text_ids(tokenizer, "\n")
    return after_line, text_ids(tokenizer, "\n" + _ANY_TEXT) == after_line + text_ids(tokenizer, _ANY_TEXT)


@lru_cache(maxsize=8)
def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text of its own accord."""
    started = list(tokenizer(_ANY_TEXT)["input_ids"])
    return started[: started.index(text_ids(tokenizer, _ANY_TEXT)[0])]


_ANY_TEXT = "a"
