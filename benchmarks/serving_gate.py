"""What a streamed token costs the gate: processor time of its process, between a stand-in engine and clients.

    python -m benchmarks.serving_gate --out benchmarks/results/serving-gate.json
    python -m benchmarks.serving_gate --against OTHER_CHECKOUT --out OUT.json

The engine is a process that sends events as vLLM words them, one a stream every --tick-ms to all streams at once, as an
engine's steps do; the clients are another. The gate is the endpoint's own, with a key, on uvloop as in Ray's replicas.
Processor time is counted, not the clock, so that what else the machine does weighs little. Another checkout's gate
(the same code at another commit) is measured by turns with this one's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving_load import NAME, Load, Server, ask_from_here
from serving.catalog import Catalog, CatalogFile, Served
from serving.engines import Engines
from serving.exchange import Receive, Scope, Send
from serving.files import ServingFolder
from serving.gate import Gate
from serving.keys import KeyStore
from serving.listening import Listen, listen
from serving.moderation_spec import Words
from serving.spec import Access

ROOT = Path(__file__).resolve().parents[1]
FILTERS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "words": (Words(type="words", words=("project x",), where="output", action="mask"),),
}


def main() -> None:
    arguments = parse()
    if arguments.part:
        uvloop.run(_PARTS[arguments.part](arguments))
        return
    trees = {"this": ROOT} | ({"other": arguments.against.resolve()} if arguments.against else {})
    with tempfile.TemporaryDirectory() as made, _running("engine", ROOT, Path(made), arguments) as (_, engine):
        rows = [row for filters in FILTERS for row in measure(trees, engine, filters, Path(made), arguments)]
    load = {"tokens": arguments.tokens, "tick_ms": arguments.tick_ms, "repeats": arguments.repeats}
    told = {"machine": _machine(), "commits": {name: _commit(tree) for name, tree in trees.items()}, "load": load}
    arguments.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose gate is measured by turns with this one")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="events of one answer")
    parser.add_argument("--tick-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("engine", "gate"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--filters", default="none", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    trees: dict[str, Path], engine: str, filters: str, made: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for every concurrency: microseconds of the gate's processor time an event, by checkout."""
    for running in arguments.concurrency:
        found: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(arguments.repeats):
            for name, tree in trees.items():
                folder = made / f"{filters}-{running}-{turn}-{name}"
                with _running("gate", tree, folder, arguments, engine, filters) as (process, told):
                    found[name].append(_cost(process, told, running, arguments.tokens))
        row = {"filters": filters, "concurrency": running, "microseconds_a_token": {}, "runs": found}
        row["microseconds_a_token"] = {name: statistics.median(costs) for name, costs in found.items()}
        print(row, flush=True)
        yield row


def _cost(process: int, told: str, running: int, tokens: int) -> float:
    """Microseconds a token, of streams that follow one that warms up."""
    url, secret = told.split()
    server, load = Server(f"{url}/v1", secret), Load(8, tokens)
    ask_from_here(server, load, running, running)
    requests = max(16, 2 * running)
    before = _processor_s(process)
    ask_from_here(server, load, requests, running)
    return 1e6 * (_processor_s(process) - before) / (requests * tokens)


def _processor_s(process: int) -> float:
    """Seconds of processor time of a process, by its clock; see clock_getcpuclockid(3) of Linux."""
    return time.clock_gettime((~process << 3) | 2)


@contextmanager
def _running(
    part: str, tree: Path, folder: Path, arguments: argparse.Namespace, engine: str = "", filters: str = "none"
) -> Iterator[tuple[int, str]]:
    """A part of the benchmark in a process of its own, with a checkout's code; and the line that it says."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-P", __file__, "--part", part, "--folder", str(folder), "--engine", engine]
    command += ["--filters", filters, "--tick-ms", str(arguments.tick_ms)]
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{ROOT}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, process.stdout.readline()
        finally:
            process.terminate()


async def run_engine(arguments: argparse.Namespace) -> None:
    """An engine that streams at a pace; says where it listens."""
    seconds = arguments.tick_ms / 1000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked = json.loads((await receive())["body"])
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in _events(asked, seconds):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    _, port = await listen(app, Listen("127.0.0.1", 0))
    print(f"http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


async def _events(asked: dict[str, Any], seconds: float) -> AsyncIterator[bytes]:
    """What vLLM sends of a completion, event by event, in step with every other stream."""
    loop, count = asyncio.get_running_loop(), asked["max_tokens"]
    told = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": NAME}
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None, "stop_reason": None}
    more = {"choices": [choice | {"prompt_token_ids": None, "token_ids": None}], "usage": None}
    piece = f"data: {json.dumps(told | more, separators=(',', ':'))}\n\n".encode()
    for _ in range(count):
        await asyncio.sleep(seconds - loop.time() % seconds)
        yield piece
    usage = {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count}
    last = told | {"choices": [], "usage": usage}
    yield f"data: {json.dumps(last, separators=(',', ':'))}\n\n".encode()


class _Handle:
    """In place of Ray's: every lease is of the one engine."""

    def __init__(self, url: str) -> None:
        self._url = url

    def options(self, **_: Any) -> _Handle:
        return self

    @property
    def lease(self) -> _Handle:
        return self

    def remote(self, ticket: str) -> AsyncIterator[str]:
        return self._grant()

    async def _grant(self) -> AsyncIterator[str]:
        yield self._url
        await asyncio.Event().wait()


async def run_gate(arguments: argparse.Namespace) -> None:
    """The endpoint's gate before the engine; says where it listens, and a key."""
    folder = ServingFolder(arguments.folder)
    catalog = CatalogFile(folder.catalog)
    catalog.write(Catalog(models={NAME: Served(name=NAME, path="/nowhere")}))
    _, secret = KeyStore(folder.keys).create("benchmark")
    access = Access(folder=folder.path, keys="required", moderation=FILTERS[arguments.filters])
    gate = Gate(Engines({NAME: _Handle(arguments.engine)}, catalog), access)
    _, port = await listen(gate, Listen("127.0.0.1", 0))
    print(f"http://127.0.0.1:{port} {secret}", flush=True)
    await asyncio.Event().wait()


def _machine() -> dict[str, Any]:
    from benchmarks.serving import _machine as machine

    return machine()


def _commit(tree: Path) -> str:
    asked = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


_PARTS = {"engine": run_engine, "gate": run_gate}

if __name__ == "__main__":
    main()
