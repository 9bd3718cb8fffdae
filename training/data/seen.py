"""What every worker fed to the model, step by step, as it did it: `training.log_examples`.

A start of the workers writes files of its own, named after the step that it goes on from. What an earlier start did
beyond that step is undone, so its rows no longer count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

_NAME = re.compile(r"after-(\d+)-worker-(\d+)\.jsonl")


class ExampleLog:
    """A worker's record of the examples that it fed, one row a step: {"step": 3, "examples": [12, 7]}."""

    def __init__(self, folder: Path, step: int) -> None:
        """All workers call this at their start, from `step` steps done."""
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for file in [file for file in folder.iterdir() if _start_of(file) >= step]:
                file.unlink()
        dist.barrier()
        self._path = folder / f"after-{step:07d}-worker-{dist.get_rank()}.jsonl"

    def add(self, step: int, examples: Sequence[int]) -> None:
        """Append what one step fed."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "examples": list(examples)}) + "\n")


def read_seen(folder: Path) -> dict[int, list[int]]:
    """The examples that all workers together fed at every step (from 1) that counts, sorted.

    Examples are numbered as in the prepared data: source after source, row after row, then the rows to replay.
    """
    latest: dict[int, int] = {}
    seen: dict[int, list[int]] = {}
    for file in sorted(folder.iterdir()):
        start = _start_of(file)
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if start > latest.get(row["step"], -1):
                latest[row["step"]], seen[row["step"]] = start, []
            seen[row["step"]] += row["examples"]
    return {step: sorted(examples) for step, examples in sorted(seen.items())}


def _start_of(file: Path) -> int:
    found = _NAME.fullmatch(file.name)
    return int(found[1]) if found else -1
