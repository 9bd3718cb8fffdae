"""`tenure batch`: many requests from a file, against an endpoint."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from rich.console import Console

from serving.batch import Done, Line, read_batch, run_batch
from serving.client import KEY_VARIABLE
from training.errors import fail

_ANSWER_S = 600.0
_TELL_EVERY_S = 10.0


def answer_batch(source: Path, out: Path, url: str, concurrency: int) -> bool:
    """Answer a file of requests; whether all were answered.

    Raises:
        TenureError: a line is no request, the two files are one, or no endpoint is there.
    """
    lines = read_batch(source)
    if source.resolve() == out.resolve():
        raise fail("the answers would be written over the requests", str(out), "give another file for the answers")
    console, began = Console(highlight=False), time.monotonic()
    told = [began]

    def tell(done: Done) -> None:
        if time.monotonic() - told[0] >= _TELL_EVERY_S:
            told[0] = time.monotonic()
            console.print(f"{done.before + done.answered + done.failed:,} of {len(lines):,}")

    done = asyncio.run(_run(lines, out, url, concurrency, tell))
    seconds = time.monotonic() - began
    before = f" ({done.before:,} were before)" if done.before else ""
    console.print(f"answered {done.answered:,} of {len(lines):,} requests{before} in {seconds:.1f} s: {out}")
    console.print(
        f"{done.prompt_tokens:,} tokens of prompts, {done.completion_tokens:,} of answers "
        f"({done.completion_tokens / seconds:,.1f} per second)"
    )
    if done.failed:
        console.print(f"[red]{done.failed:,} failed[/]: {done.errors}; the same command asks for them again")
    return not done.failed


async def _run(lines: Sequence[Line], out: Path, url: str, concurrency: int, tell: Callable[[Done], None]) -> Done:
    root = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=root, headers=headers, timeout=_ANSWER_S, limits=limits) as client:
        try:
            await client.get("/health")
        except httpx.TransportError as error:
            raise fail(f"no endpoint answers: {error}", url, "start one with: tenure serve RUN") from None
        return await run_batch(lines, out, client, concurrency, tell)
