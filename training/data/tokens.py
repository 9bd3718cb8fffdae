"""Text to token ids: alone, as a prompt, or as what follows other text."""

from __future__ import annotations

from collections.abc import Sequence
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
    bare = text_ids(tokenizer, _ANY_TEXT)
    started = list(tokenizer(_ANY_TEXT)["input_ids"])
    start = started[: started.index(bare[0])]
    return [start + ids for ids in many_ids(tokenizer, texts)]


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of text that stands after other text: without the space that SentencePiece puts before a first word."""
    return many_continued_ids(tokenizer, [text])[0]


def many_continued_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """continued_ids() of every text."""
    after_line = text_ids(tokenizer, "\n")
    if text_ids(tokenizer, "\n" + _ANY_TEXT) == after_line + text_ids(tokenizer, _ANY_TEXT):
        return many_ids(tokenizer, texts)
    found = many_ids(tokenizer, [f"\n{text}" for text in texts])
    size = len(after_line)
    return [
        ids[size:] if ids[:size] == after_line else text_ids(tokenizer, text)
        for ids, text in zip(found, texts, strict=True)
    ]


_ANY_TEXT = "a"
