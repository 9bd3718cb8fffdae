"""The load that benchmarks/serving.py puts on a server: streamed completions from processes of their own."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import aiohttp

NAME = "benchmarked"


@dataclass(frozen=True)
class Server:
    """Where a server listens, and the key that it wants."""

    url: str
    key: str


@dataclass(frozen=True)
class Load:
    """What is asked: prompts and answers in tokens, and the ids that prompts are drawn from."""

    prompt_tokens: int
    answer_tokens: int
    ids: tuple[int, int] = (1000, 20_000)


@dataclass(frozen=True)
class Asked:
    """One request's times on the machine's monotonic clock, in seconds, and the tokens of its answer."""

    began: float
    first: float
    ended: float
    tokens: int


def put_on(pool: ProcessPoolExecutor, clients: int, server: Server, load: Load, requests: int, running: int) -> Figures:
    """This many requests, so many at a time, shared out over the pool's clients."""
    asking = min(clients, running)
    share = (requests // asking, running // asking)
    found = [pool.submit(ask_from_here, server, load, *share) for _ in range(asking)]
    return Figures.of([asked for part in found for asked in part.result()])


@dataclass(frozen=True)
class Figures:
    """Output tokens a second over all, and the median seconds to the first token."""

    rate: float
    first: float

    @staticmethod
    def of(asked: list[Asked]) -> Figures:
        seconds = max(one.ended for one in asked) - min(one.began for one in asked)
        return Figures(sum(one.tokens for one in asked) / seconds, median(one.first - one.began for one in asked))


def ask_from_here(server: Server, load: Load, requests: int, running: int) -> list[Asked]:
    """The share of one client."""
    return asyncio.run(_ask_all(server, load, requests, running))


async def _ask_all(server: Server, load: Load, requests: int, running: int) -> list[Asked]:
    left = iter(range(requests))
    found: list[Asked] = []
    headers = {"authorization": f"Bearer {server.key}"}
    connector, timeout = aiohttp.TCPConnector(limit=running), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as client:

        async def work() -> None:
            for _ in left:
                found.append(await _ask(client, server, load))

        await asyncio.gather(*(work() for _ in range(running)))
    return found


async def _ask(client: aiohttp.ClientSession, server: Server, load: Load) -> Asked:
    """One streamed answer; it must be as long as was asked for."""
    body = {
        "model": NAME,
        "prompt": [random.randrange(*load.ids) for _ in range(load.prompt_tokens)],
        "max_tokens": load.answer_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tail = time.monotonic(), 0.0, b""
    async with client.post(f"{server.url}/completions", json=body) as reply:
        reply.raise_for_status()
        async for piece in reply.content.iter_any():
            first = first or time.monotonic()
            tail = (tail + piece)[-600:]
    tokens = f'"completion_tokens":{load.answer_tokens}'.encode()
    assert tokens in tail.replace(b" ", b""), tail
    return Asked(began, first, time.monotonic(), load.answer_tokens)
