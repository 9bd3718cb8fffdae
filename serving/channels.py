"""Leases of engines' replicas that the gate holds, used again as long as they are fresh, as connections are."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

# A replica ends a lease itself, when it is this old, or nobody has used it for so long. The gate stops using it a
# second before. Short enough that requests spread over a replica that joins, and that one which is to go soon may.
LIFE_S = 10.0
IDLE_S = 3.0
_MARGIN_S = 1.0


@dataclass
class Channel:
    """A replica's address and the ticket that opens it, for one request at a time."""

    url: str
    ticket: str
    opened: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)

    @property
    def fresh(self) -> bool:
        now = time.monotonic()
        return now - self.opened < LIFE_S - _MARGIN_S and now - self.used < IDLE_S - _MARGIN_S


class Channels:
    """Channels by the model that they were leased for."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Channel]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self, model: str, handle: Any) -> AsyncIterator[Channel]:
        """A channel for the length of the body; where that fails, no other to the same replica is used again."""
        channel = self._fresh(model) or await self._open(handle)
        try:
            yield channel
        except Exception:
            self._forget(channel.url)
            raise
        channel.used = time.monotonic()
        self._idle.setdefault(model, []).append(channel)

    def _fresh(self, model: str) -> Channel | None:
        idle = self._idle.get(model, [])
        while idle:
            channel = idle.pop()
            if channel.fresh:
                return channel
        return None

    async def _open(self, handle: Any) -> Channel:
        """A new lease: Ray chooses the replica, which loads the adapter first."""
        ticket = secrets.token_urlsafe(16)
        lease = handle.lease.remote(ticket)
        try:
            url = await anext(aiter(lease))
        except BaseException:
            lease.cancel()
            raise
        ending = asyncio.ensure_future(_until_over(lease))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return Channel(url, ticket)

    def _forget(self, url: str) -> None:
        for idle in self._idle.values():
            idle[:] = [channel for channel in idle if channel.url != url]


async def _until_over(lease: Any) -> None:
    """Take the end of a lease; that its replica died is found out by those who ask it."""
    await asyncio.gather(_taken(lease), return_exceptions=True)


async def _taken(lease: Any) -> None:
    async for _ in lease:
        pass
