"""What answers cost: the machine's price for the time that it was busy, over the tokens and requests of that time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Measured since the start; prices are in the currency of `price_per_hour`, and None before the first token."""

    busy_seconds: float
    requests: int
    tokens: int
    tokens_per_second: float | None
    price_per_hour: float | None
    price_per_request: float | None
    price_per_million_tokens: float | None


class Meter:
    """Adds up the time in which at least one request was at the engines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._since = 0.0
        self._busy = 0.0
        self._requests = 0
        self._tokens = 0

    def begin(self) -> None:
        """A request goes to the engines."""
        if not self._running:
            self._since = self._clock()
        self._running += 1

    def end(self, tokens: int) -> None:
        """It came back with tokens, of prompt and answer together."""
        self._running -= 1
        if not self._running:
            self._busy += self._clock() - self._since
        self._requests += 1
        self._tokens += tokens

    def cost(self, price_per_hour: float | None) -> Cost:
        """What was measured until now."""
        busy = self._busy + (self._clock() - self._since if self._running else 0.0)
        spent = None if price_per_hour is None else busy * price_per_hour / 3600
        return Cost(
            busy_seconds=busy,
            requests=self._requests,
            tokens=self._tokens,
            tokens_per_second=self._tokens / busy if busy and self._tokens else None,
            price_per_hour=price_per_hour,
            price_per_request=spent / self._requests if spent is not None and self._requests else None,
            price_per_million_tokens=1e6 * spent / self._tokens if spent is not None and self._tokens else None,
        )
