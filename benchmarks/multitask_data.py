"""Five real tasks from the packaged data sets, each with rows to learn and others to test on.

Licences: Tatoeba sentences CC BY 2.0 FR, ASDiv CC BY-NC 4.0, CommonsenseQA MIT, SIQA CC BY 4.0, Wikipedia sentences
CC BY-SA 3.0.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, str]
MOST_CHARACTERS = 180


def restore(row: dict[str, Any]) -> Row:
    """A sentence without capitals and punctuation, and as it was."""
    sentence = row["sourceString"].strip()
    return {"prompt": f"Restore: {re.sub(r'[^a-z0-9 ]', '', sentence.lower())}", "answer": sentence}


def arithmetic(row: dict[str, Any]) -> Row:
    return {"prompt": f"{row['passage']} {row['question'].strip()}", "answer": row["answer"]}


def commonsense(row: dict[str, Any]) -> Row:
    """A question with five options; the answer is the option's letter and text."""
    options = row["options"].strip().replace("\n", " ")
    return {"prompt": f"{row['question'].strip()} {options}", "answer": row["answer"]}


def social(row: dict[str, Any]) -> Row:
    """What people do and feel; the answer is the option's text without its letter."""
    options = [text.strip() for text in re.findall(r"[A-C]\. ?([^\n]*)", row["options"])]
    answer = re.sub(r"^[A-C]\. ?", "", row["answer"]).strip()
    return {"prompt": f"{row['passage']} {row['question']} {' / '.join(options)}", "answer": answer}


def continuation(row: dict[str, Any]) -> Row:
    """The first half of a sentence, and the second."""
    words = row["text"].split()
    return {"prompt": " ".join(words[: len(words) // 2]), "answer": " ".join(words[len(words) // 2 :])}


TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Row]]] = {
    "restore": ("Translation/test.jsonl", restore),
    "arithmetic": ("ASDiv/test.jsonl", arithmetic),
    "commonsense": ("CommonsenseQA/validation.jsonl", commonsense),
    "social": ("SIQA/test.jsonl", social),
    "continuation": ("wikiDataset/test.jsonl", continuation),
}


def write_tasks(source: Path, target: Path, num_train: int, num_test: int) -> None:
    """TASK.train.jsonl and TASK.test.jsonl for every task, always the same rows."""
    for name, (file, make) in TASKS.items():
        rows = list(_short(source / file, make))
        random.Random(0).shuffle(rows)
        for part, found in (("train", rows[:num_train]), ("test", rows[num_train : num_train + num_test])):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (target / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")


def _short(path: Path, make: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    """Rows with a prompt and an answer, short and each prompt once."""
    seen: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = make(json.loads(line))
        size = len(row["prompt"]) + len(row["answer"])
        if row["answer"].strip() and size <= MOST_CHARACTERS and row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield {"prompt": f"{row['prompt']}\n", "answer": row["answer"]}
