"""Bounded concurrency, fair over keys: a key with a thousand waiting requests delays another key's by one turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.refusals import retry_later


class FairQueue:
    """At most `running` requests at a time, at most `waiting` in line, none in line for longer than `wait_s`."""

    def __init__(self, running: int, waiting: int, wait_s: float) -> None:
        self._free = running
        self._most_waiting = waiting
        self._wait_s = wait_s
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(len(line) for line in self._lines.values())

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """A slot for the length of the body.

        Raises:
            Refusal: 429, the line is full or did not move in time.
        """
        await self._enter(key)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._pass_on()

    async def _enter(self, key: str) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if self.waiting >= self._most_waiting:
            raise retry_later(
                429, "too many requests are waiting; try again in a moment", "overloaded", self._wait_s / 4
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(key, deque()).append(place)
        try:
            async with asyncio.timeout(self._wait_s):
                await place
        except TimeoutError:
            message = f"no slot became free within {self._wait_s:g} s; try again later"
            raise retry_later(429, message, "overloaded", self._wait_s / 4) from None
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._pass_on()  # the slot came as the client left
            raise
        finally:
            self._leave(key, place)

    def _leave(self, key: str, place: asyncio.Future[None]) -> None:
        line = self._lines.get(key)
        if line is None:
            return
        if place in line:
            line.remove(place)
        if not line:
            del self._lines[key]

    def _pass_on(self) -> None:
        """Give a slot to the key that has waited longest for a turn, or keep it free."""
        for key in list(self._lines):
            line = self._lines.pop(key)
            while line:
                place = line.popleft()
                if not place.done():
                    if line:
                        self._lines[key] = line  # at the end: its next turn comes after everybody's
                    place.set_result(None)
                    return
        self._free += 1
