"""Synthetic instruction rows, and the folder with a spec that a data benchmark checks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
_WORDS = (
    *("apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "harbour", "island", "jacket", "kettle"),
    *("ladder", "magnet", "needle", "orange", "pencil", "quarry", "ribbon", "saddle", "tunnel", "umbrella", "valley"),
)


def short_rows(count: int) -> Iterator[Row]:
    """Sums, about ten tokens a row."""
    draw = random.Random(0)
    for _ in range(count):
        a, b = draw.randrange(1_000_000), draw.randrange(1_000_000)
        yield {"prompt": f"What is {a} plus {b}?", "completion": str(a + b)}


def long_rows(count: int) -> Iterator[Row]:
    """A question of 5 to 60 words and an answer of 5 to 120, as in common instruction sets."""
    draw = random.Random(0)
    for number in range(count):
        prompt = f"{number}: {' '.join(draw.choices(_WORDS, k=draw.randint(5, 60)))}?"
        yield {"prompt": prompt, "completion": " ".join(draw.choices(_WORDS, k=draw.randint(5, 120)))}


def as_messages(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows as chats of one turn."""
    for row in rows:
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def write_rows(path: Path, rows: Iterator[Row]) -> Path:
    """JSONL, written as the rows come."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_spec(folder: Path, model: Path, source: Row, training: Row) -> Path:
    """A spec on a source, with a target and a retention suite of questions that the rows do not hold."""
    suite = {"prompt": "prompt", "completion": "completion", "metric": "exact_match", "chat": False}
    for name in ("target", "kept"):
        items = [{"prompt": f"Spell {word} {name} backwards", "completion": word[::-1]} for word in _WORDS]
        write_rows(folder / f"{name}.jsonl", iter(items))
    spec = {
        "name": "data-benchmark",
        "model": str(model),
        "data": {"train": [source], "overlong": "drop"},
        "tuning": {"type": "lora"},
        "training": {"learning_rate": 1e-4, "epochs": 1, **training},
        "suites": {
            "target": [{"name": "target", "path": "target.jsonl", **suite}],
            "retention": [{"name": "kept", "path": "kept.jsonl", **suite}],
        },
        "contract": {"min_gain": 0.1, "max_loss": 0.1},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path
