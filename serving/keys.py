"""API keys: made, listed, revoked, checked; only hashes are stored. Counts what each has used."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from training.errors import fail

PREFIX = "tnr"
DAY_S = 86_400
_TIDY_EVERY = 500
Scope = Literal["models", "admin"]
SCOPES: tuple[Scope, ...] = ("models", "admin")
_TABLES = """
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL, scopes TEXT NOT NULL, models TEXT NOT NULL,
  created REAL NOT NULL, expires REAL, revoked REAL,
  requests_per_minute INTEGER, tokens_per_minute INTEGER, tokens_per_day INTEGER);
CREATE TABLE IF NOT EXISTS usage (
  key TEXT NOT NULL, day INTEGER NOT NULL, model TEXT NOT NULL,
  requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  PRIMARY KEY (key, day, model));
"""


@dataclass(frozen=True)
class Quota:
    """Bounds for one key; None leaves what the endpoint's limits say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True)
class Key:
    """A key without its secret. `models` are names or patterns (`support-*`); times are seconds of the epoch."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    models: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    quota: Quota = Quota()

    def state(self, now: float) -> Literal["active", "revoked", "expired"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def may_use(self, model: str) -> bool:
        """Whether the key is meant for a model of this name; administration may use all."""
        return "admin" in self.scopes or any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True)
class Use:
    """What one key used of one model in one day (UTC), counted in requests and tokens."""

    key: str
    day: int
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class KeyStore:
    """Keys and their use in one SQLite file, which the command line and the endpoint share."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.RLock()
        self._kept: sqlite3.Connection | None = None
        self._notes = 0
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT, 0o600))
        with self._open() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(_TABLES)

    def create(
        self,
        name: str,
        scopes: Sequence[Scope] = ("models",),
        models: Sequence[str] = ("*",),
        lasts_s: float | None = None,
        quota: Quota = Quota(),
    ) -> tuple[Key, str]:
        """A new key and its secret, which is told this once."""
        now = self._clock()
        made = Key(
            secrets.token_hex(6), name, tuple(scopes), tuple(models), now, lasts_s and now + lasts_s, None, quota
        )
        secret = f"{PREFIX}-{made.id}-{secrets.token_urlsafe(32)}"
        limits = (quota.requests_per_minute, quota.tokens_per_minute, quota.tokens_per_day)
        row = (made.id, name, _hash(secret), json.dumps(made.scopes), json.dumps(made.models), now, made.expires, None)
        with self._open() as database:
            database.execute("INSERT INTO keys VALUES (?,?,?,?,?,?,?,?,?,?,?)", (*row, *limits))
        return made, secret

    def all(self) -> list[Key]:
        """All keys, the newest last."""
        with self._open() as database:
            return [_key(row) for row in database.execute("SELECT * FROM keys ORDER BY created")]

    def revoke(self, which: str) -> Key:
        """Make a key, by its id, worthless from now on.

        Raises:
            TenureError: there is no such key.
        """
        with self._open() as database:
            now = self._clock()
            database.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (now, which))
            row = database.execute("SELECT * FROM keys WHERE id = ?", (which,)).fetchone()
        if row is None:
            raise fail(f"there is no key '{which}'", str(self._path), "tenure keys list shows the ids")
        return _key(row)

    def find(self, secret: str) -> Key | None:
        """The active key of a secret; None when there is none, it was revoked or has expired."""
        parts = secret.split("-", 2)
        if len(parts) != 3 or parts[0] != PREFIX:
            return None
        with self._open() as database:
            row = database.execute("SELECT * FROM keys WHERE id = ?", (parts[1],)).fetchone()
        known = row["hash"] if row is not None else _hash("")
        if not hmac.compare_digest(known, _hash(secret)) or row is None:
            return None
        key = _key(row)
        return key if key.state(self._clock()) == "active" else None

    def any_active(self, scope: Scope = "models") -> bool:
        """Whether some key of this scope works."""
        return any(scope in key.scopes and key.state(self._clock()) == "active" for key in self.all())

    def note(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Add one request to what a key has used today."""
        row = (key, self._today(), model, 1, prompt_tokens, completion_tokens)
        with self._open() as database:
            database.execute(
                "INSERT INTO usage VALUES (?,?,?,?,?,?) ON CONFLICT DO UPDATE SET requests = requests + 1,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens",
                row,
            )
        self._notes += 1
        if self._notes % _TIDY_EVERY == 0:
            threading.Thread(target=self._tidy, daemon=True).start()

    def used(self, key: str | None = None) -> list[Use]:
        """What every key, or one, has used, by day and model."""
        where, values = ("WHERE key = ?", (key,)) if key is not None else ("", ())
        with self._open() as database:
            return [Use(*row) for row in database.execute(f"SELECT * FROM usage {where} ORDER BY day, key", values)]

    def tokens_today(self, key: str) -> int:
        """Tokens of prompts and answers that a key has used since midnight UTC."""
        query = "SELECT coalesce(sum(prompt_tokens + completion_tokens), 0) FROM usage WHERE key = ? AND day = ?"
        with self._open() as database:
            return int(database.execute(query, (key, self._today())).fetchone()[0])

    def seconds_to_midnight(self) -> float:
        """How long today's quotas still last (UTC)."""
        return DAY_S - self._clock() % DAY_S

    def _today(self) -> int:
        return int(self._clock() // DAY_S)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The one connection of this object, kept: to close the last one of a file costs tens of milliseconds."""
        with self._lock:
            if self._kept is None:
                self._kept = self._connect()
            with self._kept:
                yield self._kept

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("PRAGMA wal_autocheckpoint=0")  # it waits for the disk; see _tidy
        return database

    def _tidy(self) -> None:
        """Move what the write-ahead log holds to its place, beside the requests."""
        with closing(sqlite3.connect(self._path, timeout=10)) as database:
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")


def _key(row: sqlite3.Row) -> Key:
    quota = Quota(row["requests_per_minute"], row["tokens_per_minute"], row["tokens_per_day"])
    scopes, models = tuple(json.loads(row["scopes"])), tuple(json.loads(row["models"]))
    return Key(row["id"], row["name"], scopes, models, row["created"], row["expires"], row["revoked"], quota)


def _hash(secret: str) -> str:
    """SHA-256 is enough for 256 random bits; a slow hash protects passwords, which can be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()
