"""What a checkpoint costs training: written in the background against written at once, in the same run.

    python benchmarks/gpu/checkpoint_cost.py --out benchmarks/gpu/checkpoint-cost.json

Full tuning of a random model in Llama-3.2-1B's shape (1.24 B parameters) in bf16 through DeepSpeed ZeRO 1 on one GPU,
rows of 2048 tokens, 4 a micro-batch. Every save is followed by as many steps as it takes to publish, and these are
compared with the same number of steps without one, so that what is told as blocked holds the copy, the wait for it and
whatever writing and hashing slow down afterwards. The first save in the background makes the host's memory and is told
by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from training import engine as engines
from training.checkpoint import State
from training.plan import Plan
from training.protection.layout import Layout
from training.saving import Keep, Saver
from training.spec import RunSpec

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 8192},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="saves of each kind that are timed")
    parser.add_argument("--folder", type=Path, default=Path("checkpoint-cost"), help="where they are written; emptied")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    start_process_group(gpu)
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    for measured in measure(arguments, gpu):
        arguments.out.write_text(json.dumps({"machine": machine, **measured}, indent=1) + "\n")
        print(json.dumps(measured), flush=True)
    shutil.rmtree(arguments.folder)
    dist.destroy_process_group()


def start_process_group(gpu: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= alone
    dist.init_process_group("nccl" if gpu else "gloo")


class Steps:
    """Optimizer steps of an engine over random tokens, and what they took."""

    def __init__(self, arguments: argparse.Namespace, gpu: bool) -> None:
        self.gpu = gpu
        model = make_model(arguments.shape, gpu)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        spec, plan = describe(arguments.rows, self.num_parameters)
        optimizer = engines.build_optimizer(model, spec)
        self.engine = engines.start_engine(model, optimizer, spec, plan)
        self.state = State(self.engine, optimizer, Layout.of_engine(self.engine), {})
        shape = (arguments.rows, arguments.length)
        self.ids = torch.randint(SHAPES[arguments.shape]["vocab_size"], shape, device=self.engine.device)

    def make(self) -> float:
        """Seconds of one step."""
        started = self.now()
        self.engine.backward(self.engine(input_ids=self.ids, labels=self.ids, use_cache=False).loss)
        self.engine.step()
        return self.now() - started

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def make_model(shape: str, gpu: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16")
    config._attn_implementation = "sdpa"
    with torch.device("cuda" if gpu else "cpu"):
        model: torch.nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model


def measure(arguments: argparse.Namespace, gpu: bool) -> Iterator[dict[str, Any]]:
    """What was found so far, after every save: what was measured is not lost when the machine is taken away."""
    steps = Steps(arguments, gpu)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    for _ in range(3):
        steps.make()
    plain = statistics.median(steps.make() for _ in range(10))
    found: dict[str, Any] = {
        "parameters": steps.num_parameters,
        "step_s": round(plain, 4),
        "at_once_s": [],
        "behind": [],
    }
    at_once = Saver(arguments.folder, "cost", Keep(1))
    behind = Saver(arguments.folder, "cost", Keep(1), in_background=True)
    for number in range(1, arguments.rounds + 1):
        found["at_once_s"].append(round(save_at_once(steps, at_once, number), 3))
        yield found
    found["behind_first"] = save_behind(steps, behind, 100, plain)
    yield found
    for number in range(200, 200 + arguments.rounds):
        found["behind"].append(save_behind(steps, behind, number, plain))
        blocked = statistics.median(one["blocked_s"] for one in found["behind"])
        found["blocked_share_of_at_once"] = round(blocked / statistics.median(found["at_once_s"]), 4)
        yield found
    newest = arguments.folder / f"step-{199 + arguments.rounds:07d}"
    found["checkpoint_bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    yield found


def save_at_once(steps: Steps, saver: Saver, number: int) -> float:
    """Seconds that a save takes when training waits for all of it."""
    started = steps.now()
    saver.begin(number, steps.state)
    return steps.now() - started


def save_behind(steps: Steps, saver: Saver, number: int, plain: float) -> dict[str, float]:
    """What a save in the background costs: its copy, and what the steps meanwhile take beyond plain ones."""
    started = steps.now()
    saver.begin(number, steps.state)
    copied = steps.now()
    taken = []
    while not saver.is_written:
        taken.append(steps.make())
    saver.publish()
    while saver._publishing is not None and not saver._publishing.done():
        taken.append(steps.make())
    ended = steps.now()
    saver.finish()
    return {
        "copy_s": round(copied - started, 3),
        "steps_meanwhile": len(taken),
        "slower_steps_s": round(sum(taken) - plain * len(taken), 3),
        "blocked_s": round(copied - started + sum(taken) - plain * len(taken), 3),
        "until_published_s": round(ended - started, 3),
    }


def describe(rows: int, parameters: int) -> tuple[RunSpec, Plan]:
    """A spec and plan that give the optimizer and engine of a full tuning at ZeRO 1."""
    suite = {"name": "none", "path": "none.jsonl", "metric": "cross_entropy", "text": "text"}
    spec = RunSpec.model_validate(
        {
            "name": "cost",
            "model": "none",
            "tuning": {"type": "full"},
            "data": {"train": [{"path": "none.jsonl", "prompt": "p", "completion": "c"}]},
            "suites": {"target": [suite]},
            "training": {"learning_rate": 1e-6, "global_batch_size": rows, "micro_batch_size": rows},
            "scaling": {"workers": 1, "zero_stage": 1},
        }
    )
    sizes = {"trainable_parameters": parameters, "model_parameters": parameters, "zero_stage": 1, "workers": 1}
    sizes |= {"micro_batch_size": rows, "accumulation_steps": 1, "global_batch_size": rows, "steps": 1}
    counts: dict[str, Any] = {**dict.fromkeys(Plan.__dataclass_fields__, 0), "tasks": ()}
    return spec, Plan(**{**counts, **sizes})


if __name__ == "__main__":
    main()
