"""Requests while a release rolls out, a replica is killed and the release goes back; many adapters on one base.

    python -m benchmarks.serving_events --requests 10000 --out benchmarks/results/serving-events.json
    python -m benchmarks.serving_events --stand-in --out benchmarks/results/serving-events-stand-in.json
    python -m benchmarks.serving_events --adapters 100 --model MODEL --out benchmarks/results/serving-adapters.json

The first serves a random tiny model with two replicas and two adapters, at concurrency 32: a rollout at a fifth of the
requests, SIGKILL to one engine's replica at two fifths, a rollback at four fifths; then a client leaves a stream
midway, and the engine's own metric of running requests is read until it is zero. With --stand-in the same befalls the
endpoint's gate before two processes that answer as vLLM does, on a machine too small for two engines. The last gives
one base a hundred adapters, of which sixteen stay in memory, asks each once, then all again at random, and reads the
memory of the engine's processes. On the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil

from benchmarks.serving import _machine, make_model
from benchmarks.serving_stand_in import running as stand_in
from cluster.session import ray_session
from serving.endpoint import deploy_fleet
from serving.files import ServingFolder
from serving.fleet import Engine, Fleet
from serving.keys import KeyStore
from serving.spec import Access
from training.quiet import be_quiet

RUNNING = "vllm:num_requests_running{"
ALIAS = "production"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--adapters", type=int, help="measure so many adapters on one base instead")
    parser.add_argument("--model", type=Path, help="the base; a random tiny one where none is given")
    parser.add_argument("--stand-in", action="store_true", help="engines that do no sums, without Ray and vLLM")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    be_quiet()
    with tempfile.TemporaryDirectory() as made:
        told = on_stand_ins(arguments, Path(made)) if arguments.stand_in else on_vllm(arguments, Path(made))
    arguments.out.write_text(json.dumps({"machine": _machine(), **told}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


def on_vllm(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What the endpoint does with vLLM's engines under Ray Serve."""
    base = arguments.model or make_model("tiny", scratch / "tiny")
    adapters = make_adapters(base, scratch, arguments.adapters or 2)
    engine = Engine("base", base, adapters, 8)
    replicas = 1 if arguments.adapters else 2
    fleet = Fleet((engine,), max_model_len=512, replicas=replicas, aliases={ALIAS: "adapter-0"})
    folder = ServingFolder(scratch / "serving")
    _, secret = KeyStore(folder.keys).create("benchmark", ("models", "admin"))
    access = Access(folder=folder.path, keys="required")
    with (
        ray_session(None, {"CPU": 4.0}, scratch / "ray.log"),
        deploy_fleet(fleet, {}, access, port=18_232, on_progress=print) as endpoint,
    ):
        url = endpoint.base_url.removesuffix("/v1")
        return {"model": base.name} | asyncio.run(_measure(url, secret, arguments, list(adapters)))


def on_stand_ins(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the gate does with two engines that are processes of their own, one of which is killed and comes back."""
    with ExitStack() as stack:
        engines = [stack.enter_context(stand_in("engine")) for _ in range(2)]
        told = folder / "replicas"
        told.write_text("\n".join(url for _, url in engines), encoding="utf-8")

        def kill() -> str:
            """Another takes the place of the killed one two seconds later; until then the gate is sent to both."""
            engines[0][0].kill()
            later = threading.Timer(2.0, replace)
            later.start()
            stack.callback(later.join)
            return "one of two engines, which another replaces after 2 s"

        def replace() -> None:
            _, url = stack.enter_context(stand_in("engine"))
            told.write_text(f"{engines[1][1]}\n{url}", encoding="utf-8")

        _, line = stack.enter_context(stand_in("gate", "--folder", str(folder), "--admin"))
        url, secret = line.split()
        return {"engines": "stand-ins"} | asyncio.run(_asked(url, secret, arguments, kill))


async def _asked(url: str, secret: str, arguments: argparse.Namespace, kill: Callable[[], str]) -> dict[str, Any]:
    async with _client(url, secret) as client:
        return await _events(client, arguments.requests, arguments.concurrency, kill)


def _client(url: str, secret: str) -> aiohttp.ClientSession:
    headers = {"authorization": f"Bearer {secret}"}
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=64)
    return aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector)


def make_adapters(base: Path, folder: Path, count: int) -> dict[str, Path]:
    """Random LoRA adapters of rank 8 on the attention's queries and values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wanted = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), wanted)
    made = {}
    for number in range(count):
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        made[f"adapter-{number}"] = folder / f"adapter-{number}"
        tuned.save_pretrained(str(made[f"adapter-{number}"]))
    return made


async def _measure(url: str, secret: str, arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    async with _client(url, secret) as client:
        if arguments.adapters:
            return await _many_adapters(client, names)
        events = await _events(client, arguments.requests, arguments.concurrency, _kill_a_replica)
        return events | {"seconds_until_the_engine_stops": [await _leave(client) for _ in range(5)]}


async def ask(client: aiohttp.ClientSession, model: str, stream: bool, tokens: int = 4) -> str:
    """`answered`, or what was told instead."""
    prompt = [random.randrange(10, 4000) for _ in range(16)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    try:
        async with client.post("/v1/completions", json=body) as reply:
            text = await reply.text()
    except aiohttp.ClientError as error:
        return type(error).__name__
    if reply.status == 200 and '"error"' not in text:
        return "answered"
    return f"{'after a part of its stream' if reply.status == 200 else reply.status}: {text[-160:]}"


async def _events(
    client: aiohttp.ClientSession, requests: int, concurrency: int, kill: Callable[[], str]
) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    left, began = iter(range(requests)), time.monotonic()
    log: list[dict[str, Any]] = []

    async def work() -> None:
        for number in left:
            seen[await ask(client, ALIAS, bool(number % 2))] += 1

    async def after(share: float) -> None:
        while seen.total() < share * requests:
            await asyncio.sleep(0.02)
        log.append({"requests": seen.total(), "seconds": round(time.monotonic() - began, 1)})

    async def happen() -> None:
        steps = [{"share": 0.3, "seconds": 0, "requests": 50}, {"share": 1.0, "seconds": 0, "requests": 0}]
        rollout = {"alias": ALIAS, "model": "adapter-1", "steps": steps, "watch": {"max_slowdown": 100}}
        await after(0.2)
        await _act(client, "/admin/rollouts", rollout)
        log[-1]["what"] = "a release rolls out"
        await after(0.4)
        log[-1]["what"] = f"SIGKILL to {kill()}"
        await after(0.8)
        log[-1]["what"] = "rolled back to " + (await _act(client, "/admin/rollback", {"alias": ALIAS}))["current"]

    await asyncio.gather(happen(), *(work() for _ in range(concurrency)))
    seconds = time.monotonic() - began
    rate = {"requests": requests, "concurrency": concurrency, "seconds": seconds, "replicas": 2}
    return rate | {"events": log, "outcomes": dict(seen)}


async def _act(client: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client.post(path, json=body) as reply:
        reply.raise_for_status()
        told: dict[str, Any] = await reply.json()
        return told


def _replicas() -> list[psutil.Process]:
    """The engines' replicas among this process's descendants."""
    return [
        one
        for one in psutil.Process().children(recursive=True)
        if "ServeReplica:tenure:AdapterServer" in " ".join(one.cmdline())
    ]


def _kill_a_replica() -> str:
    victim = _replicas()[0]
    os.kill(victim.pid, signal.SIGKILL)
    return "one of two replicas of the engine"


async def _running(client: aiohttp.ClientSession) -> float:
    async with client.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(RUNNING))


async def _leave(client: aiohttp.ClientSession) -> float:
    """Seconds from a client's leaving midway to an idle engine."""
    body = {"model": "base", "prompt": [5] * 16, "max_tokens": 480, "ignore_eos": True, "stream": True}
    async with client.post("/v1/completions", json=body) as reply:
        for _ in range(10):
            await reply.content.readany()
        reply.close()
    left = time.monotonic()
    while await _running(client):
        await asyncio.sleep(0.01)
    return time.monotonic() - left


async def _many_adapters(client: aiohttp.ClientSession, names: list[str]) -> dict[str, Any]:
    rows, memory = [], [_memory()]
    for turn in (names, random.sample(names, len(names))):
        seconds = []
        for name in turn:
            began = time.monotonic()
            outcome = await ask(client, name, False)
            assert outcome == "answered", outcome
            seconds.append(time.monotonic() - began)
        memory.append(_memory())
        rows.append({"median_s": median(seconds), "largest_s": max(seconds)})
    return {
        "adapters": len(names),
        "resident": Fleet(()).resident_adapters,
        "first_answers": rows[0],
        "again_at_random": rows[1],
        "engine_memory_mib": {"before": memory[0], "after_all_once": memory[1], "after_all_twice": memory[2]},
    }


def _memory() -> int:
    """Resident memory of the engines' replicas and their children, in MiB."""
    trees = [[one, *one.children(recursive=True)] for one in _replicas()]
    return sum(one.memory_info().rss for tree in trees for one in tree) // 2**20


if __name__ == "__main__":
    main()
