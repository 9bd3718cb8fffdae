"""Rows that are probably not meant: empty, absurd, garbled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ftfy.badness import is_bad

from training.inspection.samples import Sample
from training.inspection.words import normalise

TEXTS = {
    "empty prompt": "the prompt is empty",
    "answer repeats prompt": "the answer is the prompt over again",
    "placeholder": "the answer is a placeholder, such as nan or null",
    "mojibake": "characters were decoded wrongly (mojibake)",
    "control characters": "there are control characters",
    "repetition": "the same few characters, or one word, are repeated over and over",
    "special token": "the text holds a special token of the model, which is read as that token",
    "very short": "there are fewer than four characters in all",
}
_PLACEHOLDERS = {"nan", "null", "undefined", "[object object]"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_REPEATED = re.compile(r"([^\W_]{1,6}?)\1{19}|\b(\w+)(?:\W+\2\b){11}")


def find_oddities(sample: Sample, has_prompt: bool, special_tokens: Sequence[str] = ()) -> Iterator[str]:
    """The kinds, keys of TEXTS, of what is odd about a row."""
    text, answer = sample.text, normalise(sample.answer)
    if has_prompt and not sample.prompt.strip():
        yield "empty prompt"
    if answer and answer == normalise(sample.prompt):
        yield "answer repeats prompt"
    if answer in _PLACEHOLDERS:
        yield "placeholder"
    if not text.isascii() and ("\ufffd" in text or is_bad(text)):
        yield "mojibake"
    if _CONTROL.search(text):
        yield "control characters"
    if _REPEATED.search(text):
        yield "repetition"
    if any(token in text for token in special_tokens):
        yield "special token"
    if len(text.strip()) < 4:
        yield "very short"
