"""A small suite that both the release before and the new one are asked, before the new one gets a request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.exchange import App
from training.errors import Problem, fail, raise_all

MOST_ITEMS = 200
_AT_ONCE = 8


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Item(_Record):
    """A question, and a text that its answer has to hold, in any case."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Canary(_Record):
    """The items, and the share of them by which the new release may fall behind the one before."""

    items: tuple[Item, ...] = Field(min_length=1, max_length=MOST_ITEMS)
    max_loss: float = Field(default=0.0, ge=0, le=1)
    max_tokens: int = Field(default=64, ge=1, le=1024)


def read_items(path: Path) -> list[dict[str, str]]:
    """The items in a JSONL file, a `prompt` and an `answer` a line.

    Raises:
        TenureError: there is no such file, it has no items or too many, or lines that are none.
    """
    if not path.is_file():
        raise fail("there is no such file", str(path), 'give a JSONL file of {"prompt": ..., "answer": ...}')
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 0 < len(lines) <= MOST_ITEMS:
        raise fail(f"it has {len(lines)} items", str(path), f"give 1 to {MOST_ITEMS} items, one a line")
    raise_all(problem for number, line in enumerate(lines, 1) if (problem := _problem(line, f"{path}:{number}")))
    return [json.loads(line) for line in lines]


def _problem(line: str, where: str) -> Problem | None:
    try:
        Item.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        said = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        return Problem(f"this is no item of a canary suite ({said})", where, 'give {"prompt": ..., "answer": ...}')
    return None


async def loss(canary: Canary, before: str, after: str, app: App) -> str:
    """Why the new release may not take over; empty where it lost no more than it may."""
    old, new = [await right(canary, model, app) for model in (before, after)]
    if (old - new) / len(canary.items) <= canary.max_loss:
        return ""
    return f"{new} of {len(canary.items)} canary items are right, and {old} were with '{before}'"


async def right(canary: Canary, model: str, app: App) -> int:
    """How many items a model answers right; one that it does not answer is wrong."""
    free = asyncio.Semaphore(_AT_ONCE)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:

        async def ask(item: Item) -> bool:
            request = {"model": model, "messages": [{"role": "user", "content": item.prompt}]}
            async with free:
                body = {**request, "max_tokens": canary.max_tokens, "temperature": 0}
                reply = await client.post("/v1/chat/completions", json=body)
            return reply.status_code == 200 and item.answer.casefold() in _said(reply.json()).casefold()

        return sum(await asyncio.gather(*map(ask, canary.items)))


def _said(answer: Any) -> str:
    return str(answer["choices"][0]["message"].get("content") or "")
