"""Parts of serving benchmarks that need neither Ray nor vLLM: the endpoint's own gate, and engines that do no sums.

    python -P benchmarks/serving_stand_in.py engine --tick-ms 5
    python -P benchmarks/serving_stand_in.py gate --folder FOLDER

Each is a process of its own that listens on a free port of the loopback and says where. An engine streams events as
vLLM words them, one a stream every --tick-ms, to all streams at once, as an engine's steps do. The gate asks the
engines whose addresses stand in FOLDER/replicas, by turns, also those that have died since: in place of Ray's handles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving_load import NAME
from serving.catalog import Alias, Catalog, CatalogFile, Served
from serving.engines import Engines
from serving.exchange import Receive, Scope, Send
from serving.files import ServingFolder
from serving.gate import Gate
from serving.keys import KeyStore
from serving.listening import Listen, listen
from serving.moderation_spec import Words
from serving.spec import Access

ROOT = Path(__file__).resolve().parents[1]
ALIAS = "production"
FILTERS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "words": (Words(type="words", words=("project x",), where="output", action="mask"),),
}


@contextmanager
def running(part: str, *options: str, tree: Path = ROOT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A part in a process of its own, with a checkout's code; and the line that it says."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{ROOT}"}
    command = [sys.executable, "-P", __file__, part, *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


async def run_engine(arguments: argparse.Namespace) -> None:
    """An engine that answers at a pace; says where it listens."""
    seconds = arguments.tick_ms / 1000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked = json.loads((await receive())["body"])
        kind = b"text/event-stream; charset=utf-8" if asked.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        async for event in _answer(asked, seconds):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    _, port = await listen(app, Listen("127.0.0.1", 0))
    print(f"http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


async def _answer(asked: dict[str, Any], seconds: float) -> AsyncIterator[bytes]:
    """What vLLM sends of a completion, whole or event by event, in step with every other stream."""
    loop, count = asyncio.get_running_loop(), asked["max_tokens"]
    told = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": asked["model"]}
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None, "stop_reason": None}
    more = {"choices": [choice | {"prompt_token_ids": None, "token_ids": None}], "usage": None}
    piece = _event(told | more)
    for _ in range(count):
        await asyncio.sleep(seconds - loop.time() % seconds)
        if asked.get("stream"):
            yield piece
    usage = {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count}
    if asked.get("stream"):
        yield _event(told | {"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
        return
    yield json.dumps(told | {"choices": [choice | {"text": " token" * count}], "usage": usage}).encode()


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


class _Handle:
    """In place of Ray's: leases of the engines by turns."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._turn = 0

    def options(self, **_: Any) -> _Handle:
        return self

    @property
    def lease(self) -> _Handle:
        return self

    def remote(self, ticket: str) -> _Lease:
        urls = self._file.read_text(encoding="utf-8").split()
        self._turn += 1
        return _Lease(urls[self._turn % len(urls)])


class _Lease:
    def __init__(self, url: str) -> None:
        self._url = url

    def cancel(self) -> None:
        """There is nothing to give back."""

    async def __aiter__(self) -> AsyncIterator[str]:
        yield self._url


async def run_gate(arguments: argparse.Namespace) -> None:
    """The endpoint's gate before the engines; says where it listens, and a key of administration or of models."""
    folder = ServingFolder(arguments.folder)
    catalog = CatalogFile(folder.catalog)
    names = {NAME: None, "adapter-0": NAME, "adapter-1": NAME}
    models = {name: Served(name=name, path="/nowhere", base=base) for name, base in names.items()}
    catalog.write(Catalog(models=models, aliases={ALIAS: Alias(name=ALIAS, current="adapter-0")}))
    scopes: Any = ("models", "admin") if arguments.admin else ("models",)
    _, secret = KeyStore(folder.keys).create("benchmark", scopes)
    access = Access(folder=folder.path, keys="required", moderation=FILTERS[arguments.filters])
    gate = Gate(Engines({NAME: _Handle(arguments.folder / "replicas")}, catalog), access)
    _, port = await listen(gate, Listen("127.0.0.1", 0))
    print(f"http://127.0.0.1:{port} {secret}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("engine", "gate"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--filters", choices=tuple(FILTERS), default="none")
    parser.add_argument("--tick-ms", type=float, default=5.0)
    parser.add_argument("--admin", action="store_true")
    arguments = parser.parse_args()
    uvloop.run({"engine": run_engine, "gate": run_gate}[arguments.part](arguments))


if __name__ == "__main__":
    main()
