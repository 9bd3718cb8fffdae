"""Three small tasks in a row: what plain tuning forgets, and what replay and online EWC keep.

    python -m benchmarks.task_sequence --out benchmarks/results/task-sequence.json --pages DIR

A byte-level Llama of two layers (82 thousand parameters, random weights) learns to name a word's first letter, then its
last one, then its length, by full tuning: the same steps and learning rate for every way of carrying, each by `tenure
sequence`'s own code, with its workers and scoring in this one process instead of Ray's. Words are random letters; those
of the tests are not in the training rows. Scores are exact matches. `--pages` keeps each sequence's page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml

from cluster.sequence import train_sequence
from training.sequences.folder import find_sequence
from training.sequences.result import read_result
from training.workspace import Workspace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import make_tiny_model

TASKS: dict[str, Callable[[str], str]] = {
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "length": lambda word: str(len(word)),
}
WAYS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "replay": [{"type": "replay", "share": 0.25}],
    "ewc": [{"type": "ewc", "strength": 1000.0}],
}
NUM_TRAIN, NUM_TEST = 400, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=Path)
    arguments = parser.parse_args()
    found = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, alone(Path(scratch)):
        folder = Path(scratch)
        write_data(folder)
        workspace = Workspace.at(folder / "workspace")
        for way in arguments.ways:
            train_sequence(write_spec(folder, way, arguments.steps), workspace, None)
            sequence = find_sequence(workspace, f"{way}-1")
            result = read_result(sequence.result)
            assert result is not None
            found[way] = result.model_dump(mode="json")
            if arguments.pages:
                arguments.pages.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sequence.report, arguments.pages / f"{way}.html")
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    written = {"machine": about, "settings": {"steps": arguments.steps}, "sequences": found}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A process group of this process, which is every worker and scores every model."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    with (
        mock.patch("training.fit.run_workers", lambda function, config, *_: function(config)),
        mock.patch("training.evaluation.spread.run_tasks", lambda compute, jobs, *_: [compute(job) for job in jobs]),
        mock.patch("training.evaluation.spread.num_places", return_value=1),
        mock.patch("cluster.pipeline.ray_session", return_value=nullcontext()),
    ):
        yield
    dist.destroy_process_group()


def write_data(folder: Path) -> None:
    """A random model, and of every task training and test rows over words of its own."""
    make_tiny_model(folder / "random")
    draw = random.Random(0)
    for name, answer in TASKS.items():
        words = {"".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(2000)}
        rows = [{"question": f"{name} {word}", "answer": answer(word)} for word in sorted(words)]
        draw.shuffle(rows)
        write(folder / f"{name}.jsonl", rows[:NUM_TRAIN])
        write(folder / f"{name}.test.jsonl", rows[NUM_TRAIN : NUM_TRAIN + NUM_TEST])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_spec(folder: Path, way: str, steps: int) -> Path:
    """The sequence with one way of carrying."""
    columns = {"prompt": "question", "completion": "answer", "chat": False}
    spec = {
        "name": way,
        "model": str(folder / "random"),
        "tuning": {"type": "full"},
        "carry": WAYS[way],
        "training": {
            "learning_rate": 3e-3,
            "epochs": steps,
            "max_steps": steps,
            "global_batch_size": 32,
            "micro_batch_size": 32,
            "max_length": 64,
            "precision": "fp32",
            "validation_items": 0,
            "validate_every_steps": 0,
            "checkpoint_every_steps": 0,
        },
        "tasks": [
            {
                "name": name,
                "data": {"train": [{"path": f"{name}.jsonl", **columns}]},
                "suites": {
                    "target": [
                        {
                            "name": name,
                            "path": f"{name}.test.jsonl",
                            "metric": "exact_match",
                            "max_new_tokens": 4,
                            **columns,
                        }
                    ]
                },
            }
            for name in TASKS
        ],
    }
    path = folder / f"{way}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
