"""A tiny supervised run over sums: its data files and its spec, for tests that need a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SENTENCES = (
    "the cat sat on the mat",
    "rain falls on the roof",
    "two and two make four",
    "the sun sets in the west",
    "a bird sings at dawn",
    "ships sail on the sea",
    "snow covers the hills",
    "the clock strikes nine",
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Questions such as "what is 3+4" with their answers; all digits from (0, 0) on, in a fixed order."""
    pairs = [(index // 10 % 10, index % 10) for index in range(count)]
    return [{"question": f"what is {a}+{b}", "answer": str(a + b)} for a, b in pairs]


def write_tiny_spec(
    folder: Path,
    model: Path,
    *,
    tuning: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    scaling: dict[str, Any] | None = None,
    protections: list[dict[str, Any]] | None = None,
    suites: dict[str, Any] | None = None,
    rows: int = 48,
) -> Path:
    """The path of a valid spec in `folder`, with its three data files beside it.

    `tuning` and `suites` replace that section; `training` and `scaling` are laid over its defaults. The data files
    are train.jsonl, sums.jsonl (question, answer) and sentences.jsonl (text).
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", sums(rows))
    write_rows(folder / "sums.jsonl", sums(8))
    write_rows(folder / "sentences.jsonl", [{"text": text} for text in SENTENCES])
    spec = {
        "name": "tiny",
        "model": str(model),
        "tuning": tuning or {"type": "lora", "rank": 4, "alpha": 8},
        "protections": protections or [],
        "data": {
            # There are few sums of two digits, and training runs over all of them.
            "max_overlap": 1.0,
            "train": [{"path": "train.jsonl", "prompt": "question", "completion": "answer"}],
        },
        "suites": suites or _suites(),
        "training": {
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "max_length": 64,
            "precision": "fp32",
            **(training or {}),
        },
        "scaling": {"workers": 1, **(scaling or {})},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


def _suites() -> dict[str, Any]:
    target = {"name": "sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "question"}
    target |= {"completion": "answer", "max_new_tokens": 4}
    retention = {"name": "sentences", "path": "sentences.jsonl", "metric": "cross_entropy", "text": "text"}
    return {"target": [target], "retention": [retention]}
