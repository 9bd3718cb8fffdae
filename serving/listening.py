"""HTTP servers inside Ray's replicas: the endpoint's own, and one in every engine for those who hold a lease."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from serving.channels import IDLE_S, LIFE_S
from serving.engines import OVER, TICKET
from serving.exchange import App, Receive, Scope, Send

KEEP_ALIVE_S = 65
_BACKLOG = 2048
_LOOKED_AT_S = 0.5


@dataclass(frozen=True)
class Listen:
    """Where the endpoint listens; PEM files for TLS."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


async def listen(app: App, where: Listen) -> tuple[uvicorn.Server, int]:
    """Serve an app from this process's event loop; the server and its port (a free one for port 0).

    Raises:
        OSError: the address cannot be listened on.
    """
    bound = _bound(where)
    server = uvicorn.Server(_config(app, where))
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    server.serving = serving  # type: ignore[attr-defined]  # a task that nobody holds may be collected
    while not server.started:
        if serving.done():
            await serving
            raise OSError("the HTTP server ended as it began")
        await asyncio.sleep(0.01)
    return server, bound.getsockname()[1]


def _bound(where: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    # Named, since asyncio sends small pieces at once (TCP_NODELAY) only where it can tell that it is TCP.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((where.host, where.port))
    bound.listen(_BACKLOG)
    return bound


def _config(app: App, where: Listen) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if where.certificate is not None:
        tls = {"ssl_certfile": str(where.certificate), "ssl_keyfile": str(where.key)}
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        **tls,
    )


@dataclass
class Lease:
    """When a lease began and was last used, and how many requests it answers now."""

    opened: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)
    busy: int = 0

    @property
    def over(self) -> bool:
        now = time.monotonic()
        return not self.busy and (now - self.opened > LIFE_S or now - self.used > IDLE_S)


class Leases:
    """Who may ask this engine over HTTP: those with the ticket of a lease that is not over."""

    def __init__(self) -> None:
        self._held: dict[str, Lease] = {}

    async def grant(self, ticket: str, url: str) -> AsyncIterator[str]:
        """Tells the address, and lasts as long as the lease."""
        lease = self._held[ticket] = Lease()
        try:
            yield url
            while not lease.over:
                await asyncio.sleep(_LOOKED_AT_S)
        finally:
            del self._held[ticket]

    def guard(self, app: App) -> App:
        """The app for requests with a ticket alone."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            name = TICKET.encode()
            ticket = next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key == name), "")
            lease = self._held.get(ticket) if scope["type"] == "http" else None
            if lease is None:
                await _refuse(scope, send)
                return
            lease.busy += 1
            try:
                await app(scope, receive, send)
            finally:
                lease.busy -= 1
                lease.used = time.monotonic()

        return guarded


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"detail": "this server answers its endpoint alone"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((OVER.encode(), b"1"))
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
