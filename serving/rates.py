"""Requests and tokens per minute and tokens per day, by key."""

from __future__ import annotations

import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from serving.keys import KeyStore, Quota
from serving.refusals import Refusal, retry_later


class Rates:
    """What each key may still do. Windows slide and live in this process; the day's tokens are in the store."""

    def __init__(self, default: Quota, store: KeyStore) -> None:
        self._default = default
        self._store = store
        memory = MemoryStorage()
        self._requests = MovingWindowRateLimiter(memory)
        self._tokens = SlidingWindowCounterRateLimiter(memory)

    def admit(self, key: str, own: Quota) -> dict[str, str]:
        """Count one request; OpenAI's rate limit headers.

        Raises:
            Refusal: 429, the key has used up its requests or tokens; says when to come back.
        """
        quota = _either(own, self._default)
        headers: dict[str, str] = {}
        self._check_day(key, quota.tokens_per_day)
        if quota.tokens_per_minute is not None:
            item = RateLimitItemPerMinute(quota.tokens_per_minute)
            if not self._tokens.test(item, "tokens", key):
                raise _spent(
                    f"{quota.tokens_per_minute:,} tokens per minute", self._until(self._tokens, item, key, "tokens")
                )
            headers |= _told("tokens", item, self._tokens.get_window_stats(item, "tokens", key).remaining)
        if quota.requests_per_minute is not None:
            item = RateLimitItemPerMinute(quota.requests_per_minute)
            if not self._requests.hit(item, "requests", key):
                after = self._until(self._requests, item, key, "requests")
                raise _spent(f"{quota.requests_per_minute:,} requests per minute", after)
            headers |= _told("requests", item, self._requests.get_window_stats(item, "requests", key).remaining)
        return headers

    def spend(self, key: str, own: Quota, tokens: int) -> None:
        """Take an answer's tokens off the minute's; an answer may overdraw it, and the next request waits."""
        quota = _either(own, self._default)
        if quota.tokens_per_minute is None or tokens <= 0:
            return
        item = RateLimitItemPerMinute(quota.tokens_per_minute)
        left = self._tokens.get_window_stats(item, "tokens", key).remaining
        if left > 0:
            self._tokens.hit(item, "tokens", key, cost=min(tokens, left))

    def _check_day(self, key: str, tokens: int | None) -> None:
        if tokens is not None and self._store.tokens_today(key) >= tokens:
            raise _spent(f"{tokens:,} tokens per day (UTC)", self._store.seconds_to_midnight())

    @staticmethod
    def _until(
        limiter: MovingWindowRateLimiter | SlidingWindowCounterRateLimiter, item: RateLimitItem, key: str, what: str
    ) -> float:
        return max(0.0, limiter.get_window_stats(item, what, key).reset_time - time.time())


def _spent(what: str, after_s: float) -> Refusal:
    return retry_later(429, f"this key has used up its {what}", "rate_limit_exceeded", after_s)


def _either(own: Quota, default: Quota) -> Quota:
    def first(mine: int | None, other: int | None) -> int | None:
        return mine if mine is not None else other

    return Quota(
        first(own.requests_per_minute, default.requests_per_minute),
        first(own.tokens_per_minute, default.tokens_per_minute),
        first(own.tokens_per_day, default.tokens_per_day),
    )


def _told(what: str, item: RateLimitItem, left: int) -> dict[str, str]:
    return {f"x-ratelimit-limit-{what}": str(item.amount), f"x-ratelimit-remaining-{what}": str(max(0, left))}
