"""Two answers side by side, with the words marked that the other does not have there."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

# Comparing takes the square of this many words at worst; longer answers stand unmarked.
_MAX_WORDS = 600


def marked(text: str, other: str) -> Markup:
    """The text, escaped, with `<mark>` around what differs from the other; unmarked where nothing is alike."""
    words, others = (re.findall(r"\S+|\s+", one) for one in (text, other))
    if text == other or max(len(words), len(others)) > _MAX_WORDS:
        return escape(text)
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks()
    if not any("".join(words[block.a : block.a + block.size]).strip() for block in blocks):
        return escape(text)
    parts, end = [], 0
    for block in blocks:
        parts += [_mark("".join(words[end : block.a])), escape("".join(words[block.a : block.a + block.size]))]
        end = block.a + block.size
    return Markup("").join(parts)


def _mark(text: str) -> Markup:
    return Markup("<mark>{}</mark>").format(text) if text.strip() else escape(text)
