"""What a data benchmark measures, each in a process of its own; the last line of output is what was found, as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def one_pass(spec_path: str, workspace: str) -> dict[str, Any]:
    """Every global batch of an epoch packed and made into tensors, as a worker does it."""
    from training.data.batches import collate
    from training.data.packing import packed_batches
    from training.data.prepare import load_prepared, prepare
    from training.data.schedule import schedule_of

    spec, made = _read(spec_path, workspace)
    data, capacity = load_prepared(prepare(spec, made)), spec.training.max_length
    schedule = schedule_of(spec, data.sizes, 0, 0)
    started, num_rows, num_tokens, num_targets, num_fed = time.monotonic(), 0, 0, 0, 0
    for step in range(schedule.num_steps):
        for batch in packed_batches(schedule.batch(step), data.lengths, capacity, 1):
            tensors = collate([data.examples[index] for index in batch], 0, end_to_end=True)
            num_rows += len(batch)
            num_fed += tensors["input_ids"].numel()
            num_targets += int((tensors["labels"] != -100).sum())
            num_tokens += int(data.lengths[batch].sum())
    counts = {"rows": num_rows, "tokens": num_tokens, "target_tokens": num_targets, "tokens_fed": num_fed}
    return {"seconds": time.monotonic() - started, "steps": schedule.num_steps, **counts}


def tenure(spec_path: str, workspace: str) -> dict[str, Any]:
    """Seconds to read, encode and store a source and to pack all of it; imports and the spec are not counted."""
    from training.data.encoding import load_tokenizer
    from training.data.packing import efficiency, pack
    from training.data.prepare import load_prepared, prepare

    spec, made = _read(spec_path, workspace)
    load_tokenizer(Path(spec.model))
    started = time.monotonic()
    data = load_prepared(prepare(spec, made))
    rows = pack(range(len(data.train)), data.lengths, spec.training.max_length)
    seconds = time.monotonic() - started
    share = efficiency(rows, data.lengths, spec.training.max_length)
    return {"seconds": seconds, "rows": len(data.train), "tokens": int(data.lengths.sum()), "efficiency": share}


def _read(spec_path: str, workspace: str) -> Any:
    from cluster.pipeline import read_spec
    from training.workspace import Workspace

    made = Workspace.at(Path(workspace))
    return read_spec(Path(spec_path), made), made


def trl(file: str, model: str, max_length: str, processes: str, scratch: str) -> dict[str, Any]:
    """Seconds of TRL's own preparation of the same file with best-fit packing; imports are not counted."""
    from types import SimpleNamespace

    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer, __version__

    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = SFTConfig(
        output_dir=scratch,
        max_length=int(max_length),
        packing=True,
        packing_strategy="bfd",
        dataset_num_proc=int(processes),
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None)
    started = time.monotonic()
    rows = load_dataset("json", data_files=file, split="train", cache_dir=scratch)
    packed = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, True, None, "train")
    seconds = time.monotonic() - started
    num_tokens = sum(sum(lengths) for lengths in packed["seq_lengths"])
    share = num_tokens / (len(packed) * int(max_length))
    return {"seconds": seconds, "rows": len(rows), "tokens": num_tokens, "efficiency": share, "version": __version__}


_STEPS: dict[str, Callable[..., dict[str, Any]]] = {"one_pass": one_pass, "tenure": tenure, "trl": trl}

if __name__ == "__main__":
    print(json.dumps(_STEPS[sys.argv[1]](*sys.argv[2:])))
