"""An ingress as Ray's looks to the gate, without Ray or vLLM: answers in words, streams, fails in every known way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.catalog import Alias, Catalog, CatalogFile, Served
from serving.files import ServingFolder
from serving.gate import Gate
from serving.keys import KeyStore
from serving.spec import Access


class ActorDiedError(Exception):
    """As Ray's looks by its name."""


class FakeEngine:
    """What its answers say is the last message; `said` words a token. Counts what was begun and what was stopped."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.stopped = 0
        self.running = 0
        self.peak = 0
        self.broken: set[str] = set()
        self.slow: dict[str, float] = {}
        self.app = FastAPI()
        for path in ("/v1/chat/completions", "/v1/completions"):
            self.app.post(path)(self.answer)
        self.app.get("/engines/health")(lambda: {"ok": True})
        self.app.get("/engines/metrics")(lambda: Response("engine_metric 1\n", media_type="text/plain"))

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        said = _prompt_of(body)
        await asyncio.sleep(self.slow.get(body["model"], 0))
        if body["model"] in self.broken or said == "die":
            raise ActorDiedError("the actor died: secret path")
        if said == "bug":
            raise RuntimeError("Traceback (most recent call last): secret")
        if said == "too long":
            told = "This model's maximum context length is 8 tokens"
            return JSONResponse({"error": {"message": told, "type": "BadRequestError", "code": 400}}, 400)
        if said == "detail":
            raise HTTPException(422, [{"loc": ["body", "temperature"], "msg": "must be a number"}])
        words = said.split(" ")
        if body.get("stream"):
            return StreamingResponse(self.stream(body, words), media_type="text/event-stream")
        return JSONResponse(await self._whole(body, words))

    async def _whole(self, body: dict[str, Any], words: list[str]) -> dict[str, Any]:
        with _Running(self):
            await asyncio.sleep(0.5 if words[0] == "slowly" else 0.001)
        text = " ".join(words)
        chat = "messages" in body
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        return {"id": "x", "model": body["model"], "choices": [_choice(choice, "stop")], "usage": usage}

    async def stream(self, body: dict[str, Any], words: list[str]) -> AsyncIterator[str]:
        chat = "messages" in body
        with _Running(self):
            for place, word in enumerate(words):
                if word == "break":
                    yield _event({"error": {"message": "engine broke", "code": 500}})
                    return
                text = word if place == 0 else f" {word}"
                piece = {"delta": {"content": text}} if chat else {"text": text}
                yield _event({"model": body["model"], "choices": [_choice(piece, None)]})
                await asyncio.sleep(0.05 if words[0] == "slowly" else 0)
            last = {"delta": {}} if chat else {"text": ""}
            yield _event({"model": body["model"], "choices": [_choice(last, "stop")]})
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 7, "completion_tokens": len(words)}
                yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"


class _Running:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        self.engine.running += 1
        self.engine.peak = max(self.engine.peak, self.engine.running)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.engine.running -= 1
        self.engine.stopped += kind is not None


def _choice(piece: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "finish_reason": reason, **piece}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _prompt_of(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content"))
    return str(body.get("prompt"))


MODELS = {
    "base": Served(name="base", path="/models/base"),
    "tuned-1": Served(name="tuned-1", path="/runs/tuned-1", base="base"),
    "tuned-2": Served(name="tuned-2", path="/runs/tuned-2", base="base"),
}


class Endpoint:
    """A gate over a fake engine, its keys, and clients of it."""

    def __init__(self, folder: Path, **access: Any) -> None:
        self.folder = ServingFolder(folder)
        alias = Alias(name="production", current="tuned-1")
        CatalogFile(self.folder.catalog).write(Catalog(models=MODELS, aliases={"production": alias}))
        self.engine = FakeEngine()
        self.gate = Gate(self.engine.app, Access(folder=folder, **access))
        self.keys = KeyStore(self.folder.keys)
        _, self.admin = self.keys.create("root", ("models", "admin"))

    def client(self, key: str | None = None, **headers: str) -> httpx.AsyncClient:
        given = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.gate)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers={**given, **headers})


def chat(text: str, model: str = "base", **more: Any) -> dict[str, Any]:
    """A chat request of one message."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}
