"""From the gate to the engines: Ray Serve picks a replica, which is then asked over HTTP without a detour.

What passes through Ray's actors costs about a millisecond a token. So only leases do: Ray chooses the replica (the
least busy, one that holds the adapter), counts a lease as a request for autoscaling, and restarts what died. Requests
and answers go to vLLM's own server in that replica, and the next request takes the lease over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from serving.catalog import CatalogFile
from serving.channels import Channels
from serving.exchange import Message, Receive, Scope, Send
from serving.refusals import Refusal, is_gone
from serving.wire import EngineGoneError, Wire, Wires

TICKET = "x-tenure-ticket"
OVER = "x-tenure-lease-over"
TRIES = 8
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_DEAD = b"EngineCore encountered an issue"  # vLLM's words where its engine's process is gone
_INSIDE = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


class Engines:
    """An ASGI app behind the gate: it passes requests on to the engines and their answers back."""

    def __init__(self, handles: Mapping[str, Any], catalog: CatalogFile) -> None:
        """`handles` are Ray's of the engines' deployments, by the name of the model that each was started with."""
        self._started = dict(handles)
        self._catalog = catalog
        self._leasing: dict[str, Any] = {}
        self._wires = Wires()
        self._channels = Channels()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path = str(scope["path"])
        if path == "/engines/metrics":
            await _reply(send, 200, b"text/plain", (await self._metrics()).encode())
        elif path == "/engines/health":
            await asyncio.gather(*(handle.check_health.remote() for handle in self._started.values()))
            await _reply(send, 200, b"application/json", b'{"status": "ok"}')
        elif path in _INSIDE:
            await self._answer(scope, (await receive())["body"], send)
        else:
            raise Refusal(404, f"there is nothing at {path[:200]}", "unknown_url")

    async def _live(self, receive: Receive, send: Send) -> None:
        """From the start of the app to its end, when connections are closed."""
        while (kind := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{kind}.complete"})
        self._wires.close()
        await send({"type": f"{kind}.complete"})

    async def _metrics(self) -> str:
        """The metrics of one replica of every engine."""
        texts = await asyncio.gather(*(handle.metrics.remote() for handle in self._started.values()))
        return "\n".join([*dict.fromkeys(line for text in texts for line in text.splitlines()), ""])

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        """One answer; where a replica dies before anything came of it, another is asked."""
        model = json.loads(body)["model"]
        passed = _Passed(send)
        for number in range(TRIES):
            try:
                await self._ask(model, scope, body, passed)
                return
            except Exception as error:
                if passed.begun or number + 1 == TRIES or not is_gone(error):
                    raise
            await asyncio.sleep(min(_FIRST_WAIT_S * 2**number, _LONGEST_WAIT_S))

    async def _ask(self, model: str, scope: Scope, body: bytes, passed: _Passed) -> None:
        async with self._channels.use(model, self._handle(model)) as channel:
            headers = _headers(scope) | {TICKET: channel.ticket}
            async with self._wires.ask(channel.url, scope["path"], headers, body) as wire:
                await passed.on(wire)

    def _handle(self, name: str) -> Any:
        if name not in self._leasing:
            self._leasing[name] = self._new_handle(name)
        return self._leasing[name]

    def _new_handle(self, name: str) -> Any:
        model = self._catalog.read().models.get(name)
        if model is None:
            raise Refusal(404, f"the model '{name}' does not exist", "model_not_found", "model")
        if model.application is not None:
            from ray import serve

            return serve.get_app_handle(model.application).options(stream=True)
        if model.base is None:
            return self._started[model.name].options(stream=True)
        return self._started[model.base].options(stream=True, multiplexed_model_id=model.name)


class _Passed:
    """What of an engine's answer has been passed on."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def on(self, wire: Wire) -> None:
        """Pass a stream on as it comes, and anything else when it is complete."""
        kind = wire.headers.get(b"content-type", b"")
        if wire.status >= 400 or not kind.startswith(b"text/event-stream"):
            await self._whole(wire, kind)
            return
        while piece := await wire.piece():
            if not self.begun:
                self.begun = True
                await self._send(_start(wire.status, kind))
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        if not self.begun:
            raise EngineGoneError("the stream was empty")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, wire: Wire, kind: bytes) -> None:
        whole = b""
        while piece := await wire.piece():
            whole += piece
        if (wire.status == 500 and _DEAD in whole) or OVER.encode() in wire.headers:
            raise EngineGoneError("the engine died, or the lease is over")
        self.begun = True
        await _reply(self._send, wire.status, kind, whole)


def _headers(scope: Scope) -> dict[str, str]:
    """What vLLM takes from a request's headers: its id, and where its trace began."""
    wanted = (b"content-type", b"x-request-id", b"traceparent", b"tracestate")
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in wanted}


def _start(status: int, kind: bytes) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


async def _reply(send: Send, status: int, kind: bytes, body: bytes) -> None:
    await send(_start(status, kind))
    await send({"type": "http.response.body", "body": body, "more_body": False})
