"""What an endpoint serves and under which names, in one small file that its processes share and that outlives them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.workspace import write_text


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Served(_Record):
    """A model that the engines know by `name`.

    `base` is the engine's model for an adapter, and None for a model with an engine of its own, which takes adapters
    up to `max_rank`; `application` is the Serve application of an engine that joined later. `card` is what the
    playground shows of it. `source` is the address in a store that `path` was copied from.
    """

    name: str
    path: str
    base: str | None = None
    source: str | None = None
    run: str | None = None
    max_rank: int | None = None
    application: str | None = None
    created: int = 0
    card: dict[str, str] = {}


State = Literal["shadow", "rolling", "done", "rolled_back"]


class Step(_Record):
    """A share of requests, and for how long and how many at least."""

    share: float
    seconds: float
    requests: int


class Watch(_Record):
    """What ends a rollout: too many errors, or answers too slow against what the alias answers with now."""

    max_error_rate: float = 0.05
    max_slowdown: float = 2.0
    min_requests: int = 20


class Rollout(_Record):
    """A release on its way to an alias."""

    candidate: str
    steps: tuple[Step, ...]
    at: int = 0
    since: float = 0.0
    shadow: float = 0.0
    watch: Watch = Watch()
    state: State = "rolling"
    reason: str = ""


class Alias(_Record):
    """A name that clients use, and the model that answers under it."""

    name: str
    current: str
    previous: tuple[str, ...] = ()
    rollout: Rollout | None = None


class Catalog(_Record):
    """All models and aliases by name."""

    models: dict[str, Served] = {}
    aliases: dict[str, Alias] = {}

    @property
    def names(self) -> list[str]:
        """Every name that a client may ask for."""
        return [*self.aliases, *self.models]

    def with_model(self, model: Served) -> Catalog:
        return self.model_copy(update={"models": {**self.models, model.name: model}})

    def with_alias(self, alias: Alias) -> Catalog:
        return self.model_copy(update={"aliases": {**self.aliases, alias.name: alias}})


class CatalogFile:
    """The catalog on disk, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._read = Catalog()

    def read(self) -> Catalog:
        """The catalog as it is now; empty when there is none."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return Catalog()
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            self._read = Catalog.model_validate_json(self.path.read_text(encoding="utf-8"))
            self._stamp = stamp
        return self._read

    def write(self, catalog: Catalog) -> None:
        """Put a catalog in place of what is there."""
        write_text(self.path, catalog.model_dump_json(indent=1))

    def change(self, how: Callable[[Catalog], Catalog]) -> Catalog:
        """Apply a change that no other process can come between."""
        with self._held():
            self._stamp = None
            changed = how(self.read())
            self.write(changed)
        return changed

    @contextmanager
    def _held(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
