"""Prompt templates for common kinds of tasks, and the draw of one for each row under the run's seed.

`python -m training.data.instructions > docs/templates.md` writes the page that lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from training.data.row import Row

Kind = Literal[
    "answer", "answer_from", "chat", "classify", "code", "expand", "extract", "rewrite", "summarise", "translate"
]

# Over `prompt`, which is the source's own; what else they name is a column, or one of the library's values.
LIBRARY: dict[Kind, tuple[str, ...]] = {
    "answer": (
        "{{ prompt }}",
        "Answer the question.\n\n{{ prompt }}",
        "Question: {{ prompt }}\nGive a short answer.",
        "{{ prompt }}\n\nAnswer in as few words as are needed.",
    ),
    "answer_from": (
        "Answer the question from the text alone.\n\nText:\n{{ context }}\n\nQuestion: {{ prompt }}",
        "{{ context }}\n\nGoing by the text above: {{ prompt }}",
        "Read the passage, then answer.\n\n{{ context }}\n\n{{ prompt }}",
        "Question: {{ prompt }}\n\nThe answer is in this text:\n{{ context }}",
    ),
    "chat": ("{{ prompt }}",),
    "classify": (
        "Which of these fits the text: {{ labels }}?\n\n{{ prompt }}",
        "{{ prompt }}\n\nClassify the text above. Answer with one of: {{ labels }}.",
        "Labels: {{ labels }}\nText: {{ prompt }}\nGive the label alone.",
        "Read the text and choose the label that describes it best ({{ labels }}).\n\n{{ prompt }}",
    ),
    "code": (
        "{{ prompt }}",
        "Write code for the following task.\n\n{{ prompt }}",
        "Task: {{ prompt }}\n\nAnswer with code alone.",
        "{{ prompt }}\n\nImplement this.",
    ),
    "expand": (
        "Write a full text from these notes.\n\n{{ prompt }}",
        "{{ prompt }}\n\nTurn this into a complete, detailed text.",
        "Expand the following into several paragraphs:\n{{ prompt }}",
        "Here is an outline. Write it out in full.\n\n{{ prompt }}",
    ),
    "extract": (
        "Extract {{ wanted }} from the text.\n\n{{ prompt }}",
        "{{ prompt }}\n\nFrom the text above, give {{ wanted }}, and nothing else.",
        "Find {{ wanted }} in this text:\n\n{{ prompt }}",
        "Text:\n{{ prompt }}\n\nList {{ wanted }} as they stand in the text.",
    ),
    "rewrite": (
        "Rewrite the text {{ manner }}.\n\n{{ prompt }}",
        "{{ prompt }}\n\nRewrite this {{ manner }}, and keep its meaning.",
        "Put the following text {{ manner }}:\n{{ prompt }}",
    ),
    "summarise": (
        "Summarise the text.\n\n{{ prompt }}",
        "{{ prompt }}\n\nSummarise the text above in a few sentences.",
        "Write a short summary of this text:\n\n{{ prompt }}",
        "What does the following text say? Give the main points.\n\n{{ prompt }}",
        "{{ prompt }}\n\nTL;DR:",
    ),
    "translate": (
        "Translate into {{ language }}.\n\n{{ prompt }}",
        "{{ prompt }}\n\nTranslate the text above into {{ language }}.",
        "What is this in {{ language }}?\n{{ prompt }}",
        "Give the {{ language }} translation of the following text, and nothing else.\n\n{{ prompt }}",
    ),
}

_ABOUT: dict[Kind, str] = {
    "answer": "a question; its answer",
    "answer_from": "a question about `context`; its answer",
    "chat": "a user's words as they are; a reply",
    "classify": "a text; one of `labels`",
    "code": "a task in words; code",
    "expand": "notes or an outline, short; a long text",
    "extract": "a long text; what is `wanted` of it, short",
    "rewrite": "a text; the same `manner` (as in: more politely)",
    "summarise": "a long text; its summary",
    "translate": "a text; the same in `language`",
}


def draw(templates: Sequence[str], row: Row, seed: int) -> str:
    """One of the templates: the same for the same row and seed, wherever the row stands and whoever reads it."""
    content = json.dumps([seed, row], sort_keys=True, ensure_ascii=True, default=str)
    return templates[int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % len(templates)]


def page(kinds: Sequence[Kind] | None = None) -> str:
    """The library as a page of Markdown."""
    return _HEAD + "\n".join(_section(kind) for kind in kinds or tuple(LIBRARY))


def _section(kind: Kind) -> str:
    templates = "\n".join(f"```jinja\n{template}\n```" for template in LIBRARY[kind])
    return f"## {kind}\n\n{_ABOUT[kind][0].upper()}{_ABOUT[kind][1:]}.\n\n{templates}\n"


_HEAD = """# Prompt templates

The library of `templates: {library: ...}` in [a source](spec.md#data), printed by `tenure templates`. One is drawn for
each row under the run's seed. `prompt` is what the source's `prompt` gives; every other name is a column, or one of
`templates.values`. The line below a kind tells what its prompt holds, and what its completion.

"""

if __name__ == "__main__":
    print(page(), end="")
