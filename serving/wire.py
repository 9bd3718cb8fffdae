"""HTTP to the engines, as thin as it can be: bytes are passed on as they arrive, and connections are used again.

Every token of every stream comes this way, so it stands on the parser alone: a general client's buffers, timers and
iterators cost more processor time a token than all else that the gate does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import httptools

_CONNECT_S = 5.0
# Below the 65 s after which a replica closes a connection that nobody uses.
_IDLE_S = 60.0
_HIGH_BYTES = 256 * 1024


class EngineGoneError(Exception):
    """An engine cannot be reached, or its connection broke before the answer was complete."""


class Wire(asyncio.Protocol):
    """One connection to an engine, for one request at a time."""

    status: int
    headers: dict[bytes, bytes]

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False
        self._used = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self.status, self.headers = 0, {}
        self._pieces: list[bytes] = []
        self._size, self._paused = 0, False
        self._complete, self._keep = False, False
        self._parser = httptools.HttpResponseParser(self)

    @property
    def reusable(self) -> bool:
        """Whether the last answer was read to its end, and the engine keeps the connection open."""
        return self._complete and self._keep and not self._pieces and not self._lost

    @property
    def fresh(self) -> bool:
        return not self._lost and time.monotonic() - self._used < _IDLE_S

    def ask(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send a POST request."""
        self._begin()
        told = {**headers, "content-length": str(len(body))}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items()), "", ""]
        self._transport.write("\r\n".join(lines).encode("latin-1") + body)

    async def head(self) -> None:
        """Wait for the answer's status and headers.

        Raises:
            EngineGoneError: the connection broke before.
        """
        while not self.status:
            await self._arrival()

    async def piece(self) -> bytes:
        """What has arrived of the answer's body; nothing at its end.

        Raises:
            EngineGoneError: the connection broke before the end.
        """
        while not self._pieces and not self._complete:
            await self._arrival()
        pieces, self._pieces, self._size = self._pieces, [], 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._used = time.monotonic()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        self._transport.abort()

    async def _arrival(self) -> None:
        if self._lost:
            raise EngineGoneError("the engine's connection broke")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._lost = True
            self._transport.abort()
        if self._size > _HIGH_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._wake()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._complete, self._keep = True, self._parser.should_keep_alive()


class Wires:
    """Connections to engines by their address; those that are free are used again."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Wire]] = {}

    @asynccontextmanager
    async def ask(self, url: str, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Wire]:
        """The answer to a POST request, its status and headers read.

        Raises:
            EngineGoneError: the engine cannot be reached, or went away.
        """
        wire = self._free(url) or await _connected(url)
        try:
            wire.ask(path, {"host": urlsplit(url).netloc, **headers}, body)
            await wire.head()
            yield wire
        finally:
            if wire.reusable:
                self._idle.setdefault(url, []).append(wire)
            else:
                wire.close()

    def close(self) -> None:
        """Close what nobody uses."""
        for wire in [wire for idle in self._idle.values() for wire in idle]:
            wire.close()
        self._idle.clear()

    def _free(self, url: str) -> Wire | None:
        idle = self._idle.get(url, [])
        while idle:
            wire = idle.pop()
            if wire.fresh:
                return wire
            wire.close()
        return None


async def _connected(url: str) -> Wire:
    where = urlsplit(url)
    host, port = str(where.hostname), where.port or 80
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, wire = await asyncio.get_running_loop().create_connection(Wire, host, port)
    except OSError as error:  # a TimeoutError, too
        raise EngineGoneError(f"the engine at {url} cannot be reached: {error}") from error
    return wire
