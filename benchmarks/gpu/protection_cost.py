"""What a protection costs: the time of an optimizer step with it against the same step without, and its memory.

    python benchmarks/gpu/protection_cost.py --out benchmarks/gpu/protection-cost.json

Full tuning of a random model in Llama-3.2-1B's shape (1.24 B parameters) in bf16 through DeepSpeed ZeRO 1 on one GPU,
rows of 2048 tokens, 8 a micro-batch, with Liger's kernels where they are installed. Each protection is attached to the
same engine that runs without it, and blocks of steps with and without take turns. Importance is random: its values do
not change what is computed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from training import engine as engines
from training.layout import Layout
from training.plan import Plan
from training.protections import PathIntegral, QuadraticPull
from training.spec import RunSpec

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "l2sp coupled": {"update": "coupled", "weights": None},
    "l2sp proximal": {"update": "proximal", "weights": None},
    "ewc coupled": {"update": "coupled", "weights": torch.float32},
    "ewc proximal": {"update": "proximal", "weights": torch.float32},
    "ewc coupled, stored in bf16": {"update": "coupled", "weights": torch.bfloat16},
    "si coupled, not recording": {"update": "coupled", "weights": torch.float32},
    "si coupled, recording": {"update": "coupled", "weights": torch.float32, "records": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=6, help="a block")
    parser.add_argument("--rounds", type=int, default=3, help="blocks with and without, each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    start_process_group(gpu)
    results = [measure(arguments, accumulation, gpu) for accumulation in arguments.accumulation]
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    machine["kernels"] = "liger" if gpu and uses_liger() else "torch"
    arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    dist.destroy_process_group()


def uses_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def start_process_group(gpu: bool) -> None:
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


def make_model(shape: str, gpu: bool) -> torch.nn.Module:
    if gpu and uses_liger():
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16")
    config._attn_implementation = "sdpa"
    with torch.device("cuda" if gpu else "cpu"):
        model: torch.nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model


def measure(arguments: argparse.Namespace, accumulation: int, gpu: bool) -> dict[str, Any]:
    """Every protection's step against the plain step at one number of accumulated micro-batches."""
    model = make_model(arguments.shape, gpu)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spec, plan = describe(arguments.rows, accumulation, parameters)
    optimizer = engines.build_optimizer(model, spec.training, spec.tuning)
    engine = engines.start_engine(model, optimizer, spec, plan)
    layout = Layout.of_engine(engine)
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    ids = torch.randint(vocabulary, (arguments.rows, arguments.length), device=engine.device)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()

    for _ in range(4):
        step()
    found = {}
    for name, variant in VARIANTS.items():
        before = torch.cuda.memory_allocated() if gpu else 0
        hooks = attach(layout, optimizer, variant)
        held = (torch.cuda.memory_allocated() if gpu else 0) - before
        plain, protected = [], []
        for _ in range(arguments.rounds):
            toggle(optimizer, {}, {})
            plain += timed(step, arguments.steps, gpu)
            toggle(optimizer, *hooks)
            protected += timed(step, arguments.steps, gpu)
        toggle(optimizer, {}, {})
        del hooks
        found[name] = {
            "step_ms": round(1000 * statistics.median(protected), 2),
            "plain_step_ms": round(1000 * statistics.median(plain), 2),
            "ratio": round(statistics.median(protected) / statistics.median(plain), 4),
            "bytes_per_parameter": round(held / parameters, 3),
        }
        print(accumulation, name, found[name], flush=True)
    engine.destroy()
    tokens = arguments.rows * arguments.length * accumulation
    return {"parameters": parameters, "tokens_per_step": tokens, "accumulation": accumulation, "protections": found}


Hooks = tuple[dict[int, Any], dict[int, Any]]


def attach(layout: Layout, optimizer: torch.optim.Optimizer, variant: dict[str, Any]) -> Hooks:
    """The hooks of one protection, taken off again so that they can be put on and off."""
    toggle(optimizer, {}, {})
    if variant.get("records"):
        PathIntegral(layout, optimizer)
    dtype = variant["weights"]
    weights = [torch.rand_like(master).to(dtype) for master in layout.masters] if dtype else None
    QuadraticPull(layout, optimizer, strength=1e-3, weights=weights, update=variant["update"])
    hooks = dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)
    toggle(optimizer, {}, {})
    return hooks


def toggle(optimizer: torch.optim.Optimizer, pre: dict[int, Any], post: dict[int, Any]) -> None:
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    optimizer._optimizer_step_pre_hooks.update(pre)
    optimizer._optimizer_step_post_hooks.update(post)


def timed(step: Any, count: int, gpu: bool) -> list[float]:
    """Seconds of each step; the first after a change is not counted."""
    seconds = []
    for _ in range(count + 1):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def describe(rows: int, accumulation: int, parameters: int) -> tuple[RunSpec, Plan]:
    """A spec and plan that give the engine of a full tuning at ZeRO 1."""
    suite = {"name": "none", "path": "none.jsonl", "metric": "cross_entropy", "text": "text"}
    spec = RunSpec.model_validate(
        {
            "name": "cost",
            "model": "none",
            "tuning": {"type": "full"},
            "data": {"train": [{"path": "none.jsonl", "prompt": "p", "completion": "c"}]},
            "suites": {"target": [suite]},
            "training": {"learning_rate": 1e-6, "global_batch_size": rows * accumulation, "micro_batch_size": rows},
            "scaling": {"workers": 1, "zero_stage": 1},
        }
    )
    counts = dict.fromkeys(Plan.__dataclass_fields__, 0)
    plan = Plan(
        **{**counts, "trainable_parameters": parameters, "model_parameters": parameters}
        | {
            "zero_stage": 1,
            "workers": 1,
            "micro_batch_size": rows,
            "accumulation_steps": accumulation,
            "global_batch_size": rows * accumulation,
            "steps": 1,
        }
    )
    return spec, plan


if __name__ == "__main__":
    main()
