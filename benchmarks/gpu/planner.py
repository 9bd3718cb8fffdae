"""What the planner foretells against what a run takes: peak memory of a worker and seconds of a step, on one GPU.

    python benchmarks/gpu/planner.py --out benchmarks/gpu/planner.json

Each setting is trained by the run's own worker for a few steps, in a process of its own, on random weights in the shape
of a known model and on rows that fill their length; nothing is set but what the table says. Measured memory is the
most that torch's allocator held plus what the driver holds beside it; measured time is the median of the steps after
the first two. While one process is measured the next one imports its libraries. What was measured is written after
every setting, and after --seconds no other is begun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}
# Shape, tuning, ZeRO stage, tokens of a row, rows of a micro-batch, gradient checkpointing
SETTINGS: tuple[tuple[str, str, int, int, int, bool], ...] = (
    ("135m", "full", 1, 1024, 16, False),
    ("135m", "lora", 1, 1024, 16, False),
    ("1b", "full", 1, 2048, 4, False),
    ("1b", "full", 1, 2048, 8, True),
    ("1b", "full", 2, 2048, 4, False),
    ("1b", "full", 3, 2048, 4, False),
    ("1b", "lora", 1, 2048, 8, False),
    ("1b", "lora", 3, 2048, 8, True),
    ("3b", "full", 1, 2048, 4, True),
    ("8b", "lora", 1, 2048, 2, False),
    ("8b", "lora", 1, 4096, 4, True),
    ("8b", "lora", 3, 2048, 4, True),
)
STEPS, WARM_UP = 6, 2
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("planner-models"))
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="after so many a setting is given up, and the rest"
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: every setting in the tiny shape")
    parser.add_argument("--worker", action="store_true", help="wait for a setting on standard input, and measure it")
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    wanted = [("tiny", *setting[1:3], 64, 2, setting[5]) if arguments.tiny else setting for setting in SETTINGS]
    measure_all(wanted, arguments.folder, time.monotonic() + arguments.seconds, arguments.out)


def measure_all(wanted: Sequence[tuple[Any, ...]], folder: Path, ends: float, out: Path) -> None:
    """Measure settings in turn until time.monotonic() is `ends`."""
    results: list[dict[str, Any]] = []
    ready: subprocess.Popen[str] | None = start()
    for index, setting in enumerate(wanted):
        if ready is None or time.monotonic() > ends:
            break
        following = start() if index + 1 < len(wanted) else None
        results.append(ask(ready, setting, folder / str(index), ends))
        print(json.dumps(results[-1]), flush=True)
        out.write_text(json.dumps(summary(results), indent=1) + "\n")
        ready = following
    if ready:
        ready.kill()


def start() -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", "--out", os.devnull]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ask(process: subprocess.Popen[str], setting: tuple[Any, ...], folder: Path, ends: float) -> dict[str, Any]:
    started = time.perf_counter()
    asked = json.dumps([*setting, str(folder.absolute())]) + "\n"
    try:
        told, _ = process.communicate(asked, timeout=max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        told = process.communicate()[0] + "no time was left"
    names = ("shape", "tuning", "zero_stage", "row_tokens", "micro_batch_size", "gradient_checkpointing")
    about = {**dict(zip(names, setting, strict=True)), "wall_s": round(time.perf_counter() - started, 1)}
    lines = [line for line in told.splitlines() if line.startswith("RESULT ")]
    return {**about, **(json.loads(lines[-1][7:]) if lines else {"error": told[-1500:]})}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    machine = {"torch": torch.__version__, "python": platform.python_version()}
    measured = [one for one in results if "measured_gib" in one]
    memory = [abs(one["predicted_gib"] / one["measured_gib"] - 1) for one in measured if one["measured_gib"]]
    timed = [one for one in measured if one["predicted_step_s"]]
    seconds = [abs(one["predicted_step_s"] / one["measured_step_s"] - 1) for one in timed]
    worst = {"memory": max(memory, default=None), "step": max(seconds, default=None)}
    return {"machine": machine, "device": next((one["device"] for one in measured), None), "worst": worst} | {
        "settings": results
    }


# ------------------------------------------------------------------------------------------------------ one setting


def work() -> None:
    import deepspeed  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from training import worker  # noqa: F401

    setting = json.loads(sys.stdin.readline())
    print("RESULT " + json.dumps(measure(*setting)), flush=True)


def measure(
    shape: str, tuning: str, stage: int, length: int, rows: int, recomputes: bool, folder_name: str
) -> dict[str, Any]:
    """Train some steps; what was foretold and what it took."""
    import torch

    gpu, folder = torch.cuda.is_available(), Path(folder_name)
    spec_file = write_inputs(shape, tuning, stage, length, rows, recomputes, folder, gpu)
    start_group(gpu)
    trainer, foretold = start_trainer(spec_file, folder, gpu)
    seconds, marks = [], {"after_start": allocated(gpu)}
    for _ in range(STEPS):
        began = time.perf_counter()
        trainer.train_step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        marks.setdefault("after_a_step", allocated(gpu))
    held = held_bytes() if gpu else 0
    batch = trainer.schedule.batch(0)
    return {
        **foretold,
        "measured_gib": round(held / GIB, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if gpu else 0.0,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if gpu else 0.0,
        "allocated_gib": {name: round(value / GIB, 2) for name, value in marks.items()},
        "measured_step_s": round(statistics.median(seconds[WARM_UP:]), 4),
        "tokens_per_step": int(trainer.data.lengths[batch].sum()),
        "fused_loss": trainer.objective.head.fuses,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }


def allocated(gpu: bool) -> int:
    import torch

    return torch.cuda.memory_allocated() if gpu else 0


def held_bytes() -> int:
    """The most that the allocator held, and what the driver holds beside it."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved() + (total - free) - torch.cuda.memory_reserved()


def start_trainer(spec_file: Path, folder: Path, gpu: bool) -> tuple[Any, dict[str, Any]]:
    """The run's own worker on random weights; and what plan and planner say of it."""
    import torch

    from cluster.machines import Gpu
    from cluster.planning import step_seconds
    from training.data.prepare import load_prepared, prepare
    from training.job import Job, make_job
    from training.memory import memory_parts
    from training.models import read_model_info
    from training.plan import make_plan
    from training.specfile import load_spec
    from training.worker import Trainer
    from training.workspace import Workspace

    workspace = Workspace.at(folder / "workspace")
    spec = load_spec(spec_file)
    prepared = prepare(spec, workspace)
    info, counts = read_model_info(Path(spec.model)), load_prepared(prepared).counts()
    plan = make_plan(spec, info, counts, None)
    run = workspace.new_run("planner")
    job = Job(**make_job(spec, plan, prepared, run, "planner", {}))
    trainer = Trainer.start(job, run, load=random_base)
    longest = plan.row_tokens or counts.longest
    parts = memory_parts(spec, info, plan.trainable_parameters, plan.zero_stage, plan.micro_batch_size, longest)
    chip = Gpu(torch.cuda.get_device_name(), 0) if gpu else None
    return trainer, {
        "predicted_gib": round(plan.memory_per_worker_bytes / GIB, 2),
        "predicted_parts_gib": {name: round(value / GIB, 2) for name, value in vars(parts).items()},
        "predicted_step_s": step_seconds(spec, info, plan, longest, chip, 1, plan.zero_stage),
        "accumulation_steps": plan.accumulation_steps,
        "packed_row_tokens": plan.row_tokens,
    }


def random_base(tuning: Any, folder: Path, dtype: Any) -> Any:
    """A base with random weights, made where it will be used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def write_inputs(
    shape: str, tuning: str, stage: int, length: int, rows: int, recomputes: bool, folder: Path, gpu: bool
) -> Path:
    """A model's folder with holes for weights, rows of full length, and a spec over both."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(shape, folder / "model", length)
    letters, number = random.Random(0), 2 * rows * STEPS
    texts = ("".join(letters.choices("abcdefgh", k=length - 24)) for _ in range(number))
    lines = [json.dumps({"prompt": "say", "completion": text}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "few.jsonl").write_text(json.dumps({"text": "none"}) + "\n")
    kind: dict[str, Any] = {"type": "lora", "rank": 16, "alpha": 32} if tuning == "lora" else {"type": "full"}
    spec = {
        "name": "planner",
        "model": str(folder / "model"),
        "tuning": kind,
        "data": {"train": [{"path": "rows.jsonl", "prompt": "prompt", "completion": "completion"}]},
        "suites": {"target": [{"name": "few", "path": "few.jsonl", "metric": "cross_entropy", "text": "text"}]},
        "training": {"learning_rate": 1e-6, "global_batch_size": rows, "micro_batch_size": rows}
        | {"max_length": length, "max_steps": STEPS, "gradient_checkpointing": recomputes}
        | {"validate_every_steps": 0, "checkpoint_every_steps": 0, "checkpoint_in_background": False}
        | ({} if gpu else {"precision": "fp32"}),
        "scaling": {"workers": 1, "gpus_per_worker": int(gpu), "zero_stage": stage},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))
    return folder / "spec.yaml"


def write_model(shape: str, folder: Path, length: int) -> None:
    """Config, a tokenizer of bytes, and a safetensors file whose weights are a hole in the disk."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    positions = {"max_position_embeddings": 2 * length, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**SHAPES[shape], **ids, **positions, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * math.prod(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little") + told)
        stream.truncate(8 + len(told) + end)


def make_tokenizer() -> Any:
    """One token a byte, and a chat template that marks what is taught."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokens = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **tokens)


def start_group(gpu: bool) -> None:
    import socket

    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("nccl" if gpu else "gloo")


if __name__ == "__main__":
    main()
