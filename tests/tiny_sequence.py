"""A tiny sequence of three tasks of arithmetic: its data files and its spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny_spec import SENTENCES, write_rows

TASKS = {"sums": "+", "differences": "-", "products": "*"}
REPLAY = {"type": "replay", "share": 0.25}
EWC = {"type": "ewc", "strength": 1.0, "examples": 8}


def questions(sign: str, count: int, start: int = 0) -> list[dict[str, str]]:
    """Questions such as "what is 3+4" with their answers, another stretch of all digits for another start."""
    pairs = [(index // 10 % 10, index % 10) for index in range(start, start + count)]
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return [{"question": f"what is {a}{sign}{b}", "answer": str(results[sign](a, b))} for a, b in pairs]


def task(name: str, metric: str = "cross_entropy", **more: Any) -> dict[str, Any]:
    """A task whose suite has its name."""
    columns = {"prompt": "question", "completion": "answer"}
    suite = {"name": name, "path": f"{name}.test.jsonl", "metric": metric, **columns}
    return {
        "name": name,
        "data": {"train": [{"path": f"{name}.jsonl", **columns}]},
        "suites": {"target": [suite]},
    } | more


def write_sequence(folder: Path, model: Path, tasks: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    """The path of a valid sequence in `folder`, its data files beside it; sections replace those of the spec."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sign in TASKS.items():
        write_rows(folder / f"{name}.jsonl", questions(sign, 24))
        write_rows(folder / f"{name}.test.jsonl", questions(sign, 4, start=60))
    write_rows(folder / "sentences.jsonl", [{"text": text} for text in SENTENCES[:4]])
    retention = {"name": "sentences", "path": "sentences.jsonl", "metric": "cross_entropy", "text": "text"}
    training = {"learning_rate": 1e-3, "global_batch_size": 8, "max_length": 64, "precision": "fp32", "epochs": 3}
    spec: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "tuning": {"type": "full"},
        "suites": {"retention": [retention]},
        "contract": {"max_loss": 100.0},
        "training": training | {"checkpoint_every_steps": 2, "validation_items": 0},
        "tasks": [task(name) for name in TASKS] if tasks is None else tasks,
        **sections,
    }
    path = folder / "sequence.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path
