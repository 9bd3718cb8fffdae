"""One request and its answer as they pass the gate: read within bounds, measured, with errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.keys import Key
from serving.refusals import Refusal, refusal_in, refusal_of

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Json = dict[str, Any]

EVENT_END = b"\n\n"
MOST_ANSWERS = 128  # to one prompt, as OpenAI has it
CLIENT_LEFT = 499  # as nginx logs it; nobody is there to read it


class Filtering(Protocol):
    """What moderation does to an answer; see serving.moderation."""

    def whole(self, answer: Json) -> Json: ...

    def event(self, event: Json) -> Json | None: ...

    @property
    def ended(self) -> bool: ...


@dataclass
class Exchange:
    """One request on its way; what becomes of it is noted here for the log, the metrics and the quotas."""

    scope: Scope
    receive: Receive
    send: Send
    id: str
    began: float = field(default_factory=time.perf_counter)
    key: Key | None = None
    model: str = ""
    target: str = ""
    status: int = 0
    code: str = ""
    first_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    interventions: int = 0

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def key_id(self) -> str:
        return self.key.id if self.key else "-"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def header(self, name: str) -> str:
        """The value of a header, or an empty text."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key.lower() == wanted), "")

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error; what has begun to stream ends with it as its last event."""
        self.code = refusal.code or ""
        if self.status:
            self.status = refusal.status
            event = b"data: " + refusal.body + EVENT_END
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
            return
        await self.reply(refusal.status, refusal.body, headers=refusal.headers)

    async def reply(self, status: int, body: bytes, kind: str = "application/json", headers: Any = None) -> None:
        """A whole answer."""
        await self.start(status, {"content-type": kind, "content-length": str(len(body)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        told = {"x-request-id": self.id, "x-content-type-options": "nosniff", **self.headers, **headers}
        pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in told.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})


async def read_body(exchange: Exchange, max_bytes: int, timeout_s: float) -> bytes:
    """The request's body.

    Raises:
        Refusal: 413 above the bound, 408 when it does not come in time, 400 when the client left midway.
    """
    told = exchange.header("content-length")
    if told.isdigit() and int(told) > max_bytes:
        raise _too_large(max_bytes)
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(timeout_s):
            more = True
            while more:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the client left before its request was complete", "disconnected")
                pieces.append(message.get("body", b""))
                if sum(map(len, pieces)) > max_bytes:
                    raise _too_large(max_bytes)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {timeout_s:g} s", "timeout") from None
    return b"".join(pieces)


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(
        413, f"the body is larger than the {max_bytes:,} bytes that this endpoint takes", "request_too_large"
    )


def parse_body(body: bytes) -> Json:
    """The JSON object in a body.

    Raises:
        Refusal: 400, it is none.
    """
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not valid JSON: {said}", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def check_counts(request: Json) -> None:
    """Refuse more answers to one prompt than OpenAI gives: one request must not fill the engine.

    Raises:
        Refusal: 400.
    """
    for name in ("n", "best_of"):
        count = request.get(name)
        if count is not None and (
            not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MOST_ANSWERS
        ):
            raise Refusal(400, f"{name} must be a whole number from 1 to {MOST_ANSWERS}", "invalid_value", name)


async def forward(app: App, exchange: Exchange, request: Json, filtering: Filtering | None = None) -> None:
    """Pass a request on to the engine's ingress and its answer back, measured, with errors in OpenAI's form.

    Raises:
        Refusal: the ingress refused, or failed before anything was sent.
    """
    answer = _Answer(exchange, _wants_usage(request), filtering)
    if request.get("stream"):
        options = request.get("stream_options")
        request = {
            **request,
            "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True},
        }
    body = json.dumps(request).encode()
    gone = asyncio.Event()
    call = asyncio.ensure_future(app(_scope_of(exchange, body), _replay(body, gone), answer.send))
    watch = asyncio.ensure_future(_watch(exchange, call, gone))
    answer.stop = call.cancel
    try:
        await call
    except asyncio.CancelledError:
        if not (answer.over or gone.is_set()):
            raise
    except Exception as error:
        raise refusal_of(error) from error
    finally:
        watch.cancel()
        call.cancel()
    if not gone.is_set():
        await answer.finish()


async def _watch(exchange: Exchange, call: asyncio.Future[None], gone: asyncio.Event) -> None:
    """Stop the generation when the client goes away."""
    while (await exchange.receive())["type"] != "http.disconnect":
        pass
    exchange.code = "client_left"
    exchange.status = exchange.status or CLIENT_LEFT
    gone.set()
    call.cancel()


def _wants_usage(request: Json) -> bool:
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _scope_of(exchange: Exchange, body: bytes) -> Scope:
    """The request's scope with a body of another length, and without the secret."""
    dropped = (b"content-length", b"transfer-encoding", b"authorization", b"x-request-id", b"content-type")
    kept = [(name, value) for name, value in exchange.scope["headers"] if name.lower() not in dropped]
    added = [
        (b"content-length", str(len(body)).encode()),
        (b"content-type", b"application/json"),
        (b"x-request-id", exchange.id.encode()),
    ]
    return {**exchange.scope, "headers": [*kept, *added], "state": {}}


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """Receives the body once and then waits for the client to leave."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            await gone.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


class _Answer:
    """What the ingress sends, on its way to the client."""

    def __init__(self, exchange: Exchange, usage_wanted: bool, filtering: Filtering | None) -> None:
        self._exchange = exchange
        self._usage_wanted = usage_wanted
        self._filtering = filtering
        self._status = 0
        self._streams = False
        self._held = b""
        self._refusal: Refusal | None = None
        self.over = False
        self.stop: Callable[[], object] = bool

    async def send(self, message: Message) -> None:
        if self.over:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = self._status < 400 and kind.startswith(b"text/event-stream")
            if self._streams:
                await self._exchange.start(
                    self._status, {"content-type": "text/event-stream", "cache-control": "no-cache"}
                )
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._passes_as_is(body):
                self._exchange.completion_tokens += body.count(EVENT_END)  # until the last event tells the number
                self._note_first()
                await self._exchange.send({"type": "http.response.body", "body": body, "more_body": True})
                return
            self._held += body
            if self._streams and self._held:
                await self._pass_events()

    def _passes_as_is(self, body: bytes) -> bool:
        """Whether these are whole events of a stream that nobody need look at: nearly all of nearly every stream.

        A text that says the like of usage or an error has its quotes escaped.
        """
        if not self._streams or self._filtering is not None or self._held or not body.endswith(EVENT_END):
            return False
        return not (b'"usage":{' in body or b'"usage": {' in body or b'"error"' in body or b"[DONE]" in body)

    async def finish(self) -> None:
        """Send what is left.

        Raises:
            Refusal: it was an error.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._streams:
            await self._exchange.send({"type": "http.response.body", "body": self._held, "more_body": False})
            return
        if self._status >= 400 or not self._status:
            raise refusal_in(self._status or 500, self._held)
        await self._exchange.reply(self._status, self._whole(self._held))

    def _whole(self, body: bytes) -> bytes:
        self._note_first()
        if b'"usage"' not in body and self._filtering is None:
            return body
        answer = json.loads(body)
        self._note_usage(answer.get("usage"))
        return (
            body if self._filtering is None else json.dumps(self._filtering.whole(answer), ensure_ascii=False).encode()
        )

    async def _pass_events(self) -> None:
        """Send on every event that is complete."""
        *events, self._held = self._held.split(EVENT_END)
        passed = b"".join(self._event(event) for event in events if event)
        if passed:
            self._note_first()
            await self._exchange.send({"type": "http.response.body", "body": passed, "more_body": True})
        if self._filtering is not None and self._filtering.ended:
            self._held = b"data: [DONE]" + EVENT_END
            self._end()

    def _event(self, event: bytes) -> bytes:
        """An event as the client gets it; events of usage alone only where it asked for them."""
        if event == b"data: [DONE]":
            return event + EVENT_END
        last = b'"usage":{' in event or b'"usage": {' in event
        if not last:
            self._exchange.completion_tokens += 1  # one token an event, until the last tells the true number
        if not last and self._filtering is None and b'"error"' not in event:
            return event + EVENT_END
        return self._parsed(event)

    def _parsed(self, event: bytes) -> bytes:
        told = json.loads(event.removeprefix(b"data: "))
        self._note_usage(told.get("usage"))
        if "error" in told and "choices" not in told:
            error = told["error"] if isinstance(told["error"], dict) else {}
            self._refusal = refusal_in(int(error.get("code") or 500), json.dumps(told).encode())
            self._end()
            return b""
        if told.get("choices") == [] and told.get("usage"):
            return event + EVENT_END if self._usage_wanted else b""
        if self._filtering is None:
            return event + EVENT_END
        filtered = self._filtering.event(told)
        return b"" if filtered is None else b"data: " + json.dumps(filtered, ensure_ascii=False).encode() + EVENT_END

    def _end(self) -> None:
        """Take no more from the engine."""
        self.over = True
        self.stop()

    def _note_first(self) -> None:
        if self._exchange.first_s is None:
            self._exchange.first_s = self._exchange.seconds

    def _note_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self._exchange.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self._exchange.completion_tokens = int(usage.get("completion_tokens") or 0)
