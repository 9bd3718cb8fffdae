"""Text as words, and words as numbers: what duplicates and overlaps are looked for in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts written without spaces go character by character: CJK, kana, Hangul, Thai, Lao, Khmer, Burmese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
# Operators are words, so that 3 + 4 and 3 * 4 differ; other punctuation is dropped.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[-+*/=<>^%](?=\s*\d)")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def normalise(text: str) -> str:
    """Compatibility forms unified, case folded, white space made single spaces."""
    folded = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(folded.split())


def split_words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return _WORD.findall(normalise(text))


def hash_words(words: Sequence[str]) -> Hashes:
    """(len(words),) numbers, the same in every process."""
    return np.fromiter(map(_hash_word, words), np.uint64, len(words))


def join_grams(hashed: Hashes, size: int) -> Hashes:
    """(len(hashed) - size + 1,) numbers, one for each run of `size` words: a polynomial in their hashes modulo 2^64."""
    count = len(hashed) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    grams = np.zeros(count, np.uint64)
    for offset in range(size):
        grams = grams * _FACTOR + hashed[offset : offset + count]
    return grams


def hash_grams(words: Sequence[str], size: int) -> Hashes:
    """One number for each run of `size` words; none where there are fewer words."""
    return join_grams(hash_words(words), size)


@lru_cache(maxsize=2**18)
def _hash_word(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest())


def hash_text(text: str) -> bytes:
    """Sixteen bytes that tell texts apart."""
    return blake2b(text.encode(), digest_size=16).digest()
