"""A release takes over an alias in steps; errors or slowness send it back. Pure but for the catalog's file."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from serving.audit import note_act
from serving.catalog import Alias, Catalog, CatalogFile, Rollout
from serving.exchange import App, Exchange, Json, Message, forward
from serving.refusals import Refusal

_KEPT = 500
_MOST_MIRRORS = 16


@dataclass
class Seen:
    """What the last requests of one model came to: seconds to the first token (or the whole) of those that worked."""

    total: int = 0
    failed: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    @property
    def error_rate(self) -> float:
        return self.failed / self.total if self.total else 0.0

    def note(self, ok: bool, seconds: float) -> None:
        self.total += 1
        self.failed += not ok
        if ok:
            self.seconds.append(seconds)


def verdict(rollout: Rollout, candidate: Seen, current: Seen, now: float) -> tuple[str, str]:
    """What to do next with a rollout, and why: hold, advance or roll_back."""
    watch = rollout.watch
    if candidate.total >= watch.min_requests and candidate.error_rate > watch.max_error_rate:
        return "roll_back", f"{candidate.failed} of {candidate.total} requests failed"
    if min(len(candidate.seconds), len(current.seconds)) >= watch.min_requests:
        slower = median(candidate.seconds) / max(median(current.seconds), 1e-6)
        if slower > watch.max_slowdown:
            return "roll_back", f"{slower:.1f} times as long to the first token as {watch.max_slowdown:g} allowed"
    step = rollout.steps[rollout.at]
    if now - rollout.since >= step.seconds and candidate.total >= step.requests:
        return "advance", ""
    return "hold", ""


def advanced(alias: Alias, now: float) -> Alias:
    """The alias with its rollout one step on; after the last the candidate is current."""
    rollout = alias.rollout
    assert rollout is not None
    if rollout.at + 1 < len(rollout.steps):
        return alias.model_copy(update={"rollout": rollout.model_copy(update={"at": rollout.at + 1, "since": now})})
    return settled(alias, rollout.candidate, rollout.model_copy(update={"state": "done", "since": now}))


def settled(alias: Alias, current: str, rollout: Rollout | None = None) -> Alias:
    """The alias with another model at once; the one before is remembered."""
    previous = (alias.current, *(name for name in alias.previous if name not in (alias.current, current)))
    return Alias(name=alias.name, current=current, previous=previous[:10], rollout=rollout)


def stopped(alias: Alias, reason: str, now: float) -> Alias:
    """The alias with its rollout taken back."""
    assert alias.rollout is not None
    ended = alias.rollout.model_copy(update={"state": "rolled_back", "reason": reason, "since": now})
    return alias.model_copy(update={"rollout": ended})


def is_running(alias: Alias) -> bool:
    return alias.rollout is not None and alias.rollout.state in ("rolling", "shadow")


class Conductor:
    """Shares requests out between an alias's model and its candidate, and moves rollouts on."""

    def __init__(
        self,
        file: CatalogFile,
        audit: Path,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._audit = audit
        self._draw = draw
        self._clock = clock
        self._seen: dict[tuple[str, str], Seen] = {}
        self._mirrors: set[asyncio.Task[None]] = set()

    def target_of(self, name: str, catalog: Catalog) -> str:
        """The model that answers a request for this name."""
        alias = catalog.aliases.get(name)
        if alias is None:
            return name
        rollout = alias.rollout
        if rollout is None or rollout.state != "rolling":
            return alias.current
        return rollout.candidate if self._draw() < rollout.steps[rollout.at].share else alias.current

    def forget(self, alias: str) -> None:
        """Start counting anew, for a new rollout."""
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != alias}

    def observe(self, exchange: Exchange) -> None:
        """Note what a request came to; moves the rollout of its alias on or back."""
        catalog = self._file.read()
        alias = catalog.aliases.get(exchange.model)
        if alias is None or not is_running(alias) or exchange.code == "client_left":
            return
        self._note(alias.name, exchange.target, exchange)
        self._decide(alias)

    def _note(self, alias: str, target: str, exchange: Exchange) -> None:
        ok = 0 < exchange.status < 500
        seconds = exchange.first_s if exchange.first_s is not None else exchange.seconds
        self._seen.setdefault((alias, target), Seen()).note(ok, seconds)

    def _decide(self, alias: Alias) -> None:
        rollout = alias.rollout
        assert rollout is not None
        candidate = self._seen.setdefault((alias.name, rollout.candidate), Seen())
        current = self._seen.setdefault((alias.name, alias.current), Seen())
        what, why = verdict(rollout, candidate, current, self._clock())
        if what == "roll_back":
            self._change(alias.name, lambda found: stopped(found, why, self._clock()))
            note_act(self._audit, "rollout rolled back", "endpoint", alias=alias.name, model=rollout.candidate, why=why)
        elif what == "advance" and rollout.state == "rolling":
            self._change(alias.name, lambda found: advanced(found, self._clock()))
            note_act(
                self._audit,
                "rollout advanced",
                "endpoint",
                alias=alias.name,
                model=rollout.candidate,
                step=rollout.at + 1,
            )
        elif what == "advance":
            self._change(alias.name, lambda found: _begin(found, self._clock()))

    def _change(self, name: str, how: Callable[[Alias], Alias]) -> None:
        def change(catalog: Catalog) -> Catalog:
            alias = catalog.aliases[name]
            return catalog.with_alias(how(alias)) if is_running(alias) else catalog

        self._file.change(change)

    def mirror(self, exchange: Exchange, request: Json, catalog: Catalog, app: App) -> Callable[[], None] | None:
        """What sends a copy of a request to the candidate of a shadow rollout, whose answer nobody sees."""
        alias = catalog.aliases.get(exchange.model)
        rollout = alias.rollout if alias else None
        if rollout is None or rollout.state != "shadow" or self._draw() >= rollout.shadow:
            return None
        if len(self._mirrors) >= _MOST_MIRRORS:
            return None
        copied = {**request, "model": rollout.candidate}

        def start() -> None:
            task = asyncio.ensure_future(self._shadow(exchange, copied, rollout.candidate, app))
            self._mirrors.add(task)
            task.add_done_callback(self._mirrors.discard)

        return start

    async def _shadow(self, exchange: Exchange, request: Json, candidate: str, app: App) -> None:
        async def silent() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("never")

        async def drop(message: Message) -> None:
            return None

        copied = Exchange(exchange.scope, silent, drop, f"{exchange.id}-shadow", model=exchange.model, target=candidate)
        try:
            await forward(app, copied, request)
        except Refusal as refusal:
            copied.status = refusal.status
        self.observe(copied)


def _begin(alias: Alias, now: float) -> Alias:
    """From shadow to the first step."""
    assert alias.rollout is not None
    return alias.model_copy(update={"rollout": alias.rollout.model_copy(update={"state": "rolling", "since": now})})
