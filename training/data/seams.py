"""The ids of a prompt from those of the same text with its answer, where special tokens part them.

A tokenizer cuts text at its special tokens before anything else, so that what stands on either side of one is encoded
alike whatever stands on the other. A prompt's ids are therefore those of the longer text up to the prompt's last
special token, and from there on those of the prompt's tail alone, the same header for most prompts of a template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from training.data.tokens import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seam:
    """A prompt's last special token: which one it is, counted from 1, and the prompt from there on."""

    count: int
    tail: str


def last_seam(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Seam | None:
    """None where the prompt holds no special token, or the tokenizer has none that it only cuts at."""
    pattern, _ = _special(tokenizer)
    places = [found.start() for found in pattern.finditer(prompt)] if pattern else []
    return Seam(len(places), prompt[places[-1] :]) if places else None


def prompt_within(tokenizer: PreTrainedTokenizerBase, seam: Seam, whole: str, ids: Sequence[int]) -> list[int] | None:
    """The ids of a prompt; None where text and ids disagree on how many special tokens there are.

    Args:
        seam: the prompt's last_seam().
        whole: text that begins with the prompt.
        ids: of `whole`.
    """
    pattern, special = _special(tokenizer)
    assert pattern is not None
    places = _places(list(ids), special)
    if len(places) != len(pattern.findall(whole)):
        return None
    return [*ids[: places[seam.count - 1]], *_tail_ids(tokenizer, seam.tail)]


def _places(ids: list[int], special: frozenset[int]) -> list[int]:
    """Where special tokens stand, in order; looked for one by one, since a row has few of them."""
    found: list[int] = []
    for token in special.intersection(ids):
        place = -1
        for _ in range(ids.count(token)):
            place = ids.index(token, place + 1)
            found.append(place)
    return sorted(found)


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str] | None, frozenset[int]]:
    """What finds the tokens that text is cut at, longer ones first, and their ids."""
    found = {} if not tokenizer.is_fast else tokenizer.added_tokens_decoder
    own = {
        token.content: number
        for number, token in found.items()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }
    names = sorted(own, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None, frozenset(own.values())


@lru_cache(maxsize=1024)
def _tail_ids(tokenizer: PreTrainedTokenizerBase, tail: str) -> tuple[int, ...]:
    return tuple(text_ids(tokenizer, tail))
