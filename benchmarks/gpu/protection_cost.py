"""What a protection costs: the time of an optimizer step with it against the same step without, and its memory.

    python benchmarks/gpu/protection_cost.py --out benchmarks/gpu/protection-cost.json

Full tuning of a random model in Llama-3.2-1B's shape (1.24 B parameters) in bf16 through DeepSpeed ZeRO 1 on one GPU,
rows of 2048 tokens, 8 a micro-batch, with Liger's kernels where they are installed. Every protection gets an engine of
its own, and so does plain training; all take turns, in several rounds. Importance is random: its values do not change
what is computed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from training import engine as engines
from training.plan import Plan
from training.protection.layout import Layout
from training.protection.protections import PathIntegral, QuadraticPull
from training.spec import RunSpec

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}


@dataclass(frozen=True)
class Variant:
    """A protection as it is attached.

    Attributes:
        weights: the dtype of importance and anchors; None for L2-SP, which has anchors alone, in fp32.
        has_hooks: it acts in hooks around torch's fused AdamW, as on a CPU, instead of in one pass with it.
    """

    update: str
    weights: torch.dtype | None = torch.float32
    records: bool = False
    has_hooks: bool = False


VARIANTS: dict[str, Variant | None] = {
    "none": None,
    "l2sp coupled": Variant("coupled", None),
    "l2sp proximal": Variant("proximal", None),
    "ewc coupled": Variant("coupled"),
    "ewc proximal": Variant("proximal"),
    "ewc coupled, stored in bf16": Variant("coupled", torch.bfloat16),
    "si coupled, recording": Variant("coupled", records=True),
    "si proximal, recording": Variant("proximal", records=True),
    "ewc coupled, in hooks": Variant("coupled", has_hooks=True),
    "si coupled, recording, in hooks": Variant("coupled", records=True, has_hooks=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=8, help="timed, of each variant in each round")
    parser.add_argument("--rounds", type=int, default=2, help="over all variants")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    start_process_group(gpu)
    results: dict[int, dict[str, Any]] = {}
    for accumulation in arguments.accumulation:
        for found in measure(arguments, accumulation, gpu):
            results[accumulation] = found
            write(arguments.out, list(results.values()), gpu)
    dist.destroy_process_group()


def write(path: Path, results: list[dict[str, Any]], gpu: bool) -> None:
    """The JSON file, after every round: what was measured is not lost when the machine is taken away."""
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    machine["kernels"] = "liger" if gpu and uses_liger() else "torch"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


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


def measure(arguments: argparse.Namespace, accumulation: int, gpu: bool) -> Iterator[dict[str, Any]]:
    """Every protection's step against the plain step, with what was found so far after each round."""
    taken: dict[str, list[Taken]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, variant in VARIANTS.items():
            taken[name].append(run_steps(arguments, accumulation, variant, gpu))
            free(gpu)
            times = [round(1000 * s, 1) for s in taken[name][-1].seconds]
            print(accumulation, name, times, flush=True)
        tokens = arguments.rows * arguments.length * accumulation
        yield {"tokens_per_step": tokens, "accumulation": accumulation, **figures(taken)}


def figures(taken: dict[str, list[Taken]]) -> dict[str, Any]:
    plain, parameters = taken["none"], taken["none"][0].parameters
    found = {
        name: {
            "step_ms": round(1000 * median(rounds), 2),
            "ratio": round(median(rounds) / median(plain), 4),
            "bytes_per_parameter": round(rounds[0].held / parameters, 3),
            "peak_bytes_per_parameter": round((rounds[0].peak - plain[0].peak) / parameters, 3),
        }
        for name, rounds in taken.items()
    }
    return {"parameters": parameters, "rounds": len(plain), "protections": found}


@dataclass(frozen=True)
class Taken:
    """The seconds of a variant's steps, the bytes that it holds, and the most that was allocated, in all."""

    seconds: list[float]
    held: int
    peak: int
    parameters: int


def median(rounds: list[Taken]) -> float:
    return statistics.median(seconds for taken in rounds for seconds in taken.seconds)


def run_steps(arguments: argparse.Namespace, accumulation: int, variant: Variant | None, gpu: bool) -> Taken:
    """A new engine with the protection, warmed up and timed."""
    model = make_model(arguments.shape, gpu)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spec, plan = describe(arguments.rows, accumulation, parameters, variant)
    optimizer = engines.build_optimizer(model, spec)
    engine = engines.start_engine(model, optimizer, spec, plan)
    before = torch.cuda.memory_allocated() if gpu else 0
    kept = attach(Layout.of_engine(engine), optimizer, variant) if variant else ()
    held = (torch.cuda.memory_allocated() if gpu else 0) - before
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    ids = torch.randint(vocabulary, (arguments.rows, arguments.length), device=engine.device)
    step = partial(make_step, engine, ids, accumulation)
    timed(step, 4, gpu)
    seconds = timed(step, arguments.steps, gpu)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    del kept
    engine.destroy()
    optimizer.state.clear()
    optimizer.param_groups.clear()
    return Taken(seconds, held, peak, parameters)


def make_step(engine: Any, ids: torch.Tensor, accumulation: int) -> None:
    for _ in range(accumulation):
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()


def free(gpu: bool) -> None:
    """Give back what the last engine held, which is a cycle of references, and its compiled step."""
    torch._dynamo.reset()
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attach(layout: Layout, optimizer: torch.optim.Optimizer, variant: Variant) -> tuple[Any, ...]:
    path = PathIntegral(layout, optimizer) if variant.records else None
    dtype = variant.weights
    weights = [torch.rand_like(master, dtype=dtype) for master in layout.masters] if dtype else None
    return path, QuadraticPull(layout, optimizer, strength=1e-3, weights=weights, update=variant.update)


def timed(step: Any, count: int, gpu: bool) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for _ in range(count):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def describe(rows: int, accumulation: int, parameters: int, variant: Variant | None) -> tuple[RunSpec, Plan]:
    """A spec and plan that give the optimizer and engine of a full tuning at ZeRO 1."""
    suite = {"name": "none", "path": "none.jsonl", "metric": "cross_entropy", "text": "text"}
    spec = RunSpec.model_validate(
        {
            "name": "cost",
            "model": "none",
            "tuning": {"type": "full"},
            "protections": [{"type": "l2sp", "strength": 1e-3}] if variant and not variant.has_hooks else [],
            "data": {"train": [{"path": "none.jsonl", "prompt": "p", "completion": "c"}]},
            "suites": {"target": [suite]},
            "training": {"learning_rate": 1e-6, "global_batch_size": rows * accumulation, "micro_batch_size": rows},
            "scaling": {"workers": 1, "zero_stage": 1},
        }
    )
    counts: dict[str, Any] = {**dict.fromkeys(Plan.__dataclass_fields__, 0), "tasks": ()}
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
