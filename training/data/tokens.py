"""Text to token ids: alone, as a prompt, or as what follows other text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of rendered text: nothing is added."""
    return many_ids(tokenizer, [text])[0]


def many_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """text_ids() of every text. One call for all of them costs half as much as one for each."""
    filled = [text for text in texts if text]
    found: Any = tokenizer(filled, add_special_tokens=False, return_attention_mask=False)["input_ids"] if filled else []
    ids = iter(found)
    return [list(next(ids)) if text else [] for text in texts]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a plain prompt: the tokenizer's own start tokens and the text, without the end that some add."""
    return many_prompt_ids(tokenizer, [text])[0]


def many_prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """prompt_ids() of every text."""
    start = _start_ids(tokenizer)
    return [start + ids for ids in many_ids(tokenizer, texts)]


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of text that stands after other text: without the space that SentencePiece puts before a first word."""
    return many_continued_ids(tokenizer, [text])[0]


def many_continued_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """continued_ids() of every text."""
    after_line, is_plain = _after_line(tokenizer)
    if is_plain:
        return many_ids(tokenizer, texts)
    found = many_ids(tokenizer, [f"\n{text}" for text in texts])
    size = len(after_line)
    return [
        ids[size:] if ids[:size] == after_line else text_ids(tokenizer, text)
        for ids, text in zip(found, texts, strict=True)
    ]


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
