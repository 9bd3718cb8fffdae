"""`tenure keys`: the API keys of a workspace's endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table

from serving.audit import note_act, this_user
from serving.files import ServingFolder
from serving.keys import DAY_S, Key, KeyStore, Quota, Scope, Use
from training.errors import fail
from training.workspace import Workspace


def serving_folder(workspace: Workspace) -> ServingFolder:
    """Where this workspace's endpoint keeps its things."""
    return ServingFolder(workspace.root / "serving")


def create_key(
    workspace: Workspace,
    name: str,
    models: tuple[str, ...],
    admin: bool,
    days: float | None,
    quota: Mapping[str, int | None],
) -> None:
    """Make a key; its secret goes to the standard output alone, so that it can be piped."""
    if not name.isprintable() or not 0 < len(name) <= 100:
        raise fail(f"{name[:100]!r} cannot name a key", "", "use up to 100 printable characters")
    folder = serving_folder(workspace)
    scopes: tuple[Scope, ...] = ("models", "admin") if admin else ("models",)
    lasts_s = days * DAY_S if days is not None else None
    key, secret = KeyStore(folder.keys).create(name, scopes, models or ("*",), lasts_s, Quota(**quota))
    note_act(folder.audit, "key created", this_user(), key=key.id, name=name, scopes=scopes, models=key.models)
    click.echo(f"key {key.id} ({name}); this is told once:", err=True)
    click.echo(secret)


def list_keys(workspace: Workspace, as_json: bool) -> None:
    """Show all keys and their use of today and in all, in tokens."""
    store, now = KeyStore(serving_folder(workspace).keys), time.time()
    uses = store.used()
    if as_json:
        rows = [asdict(key) | {"state": key.state(now), "tokens": _tokens(uses, key)} for key in store.all()]
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table("id", "name", "scopes", "models", "state", "expires", "requests", "tokens", box=None)
    for key in store.all():
        requests = sum(use.requests for use in uses if use.key == key.id)
        expires = datetime.fromtimestamp(key.expires, UTC).strftime("%Y-%m-%d") if key.expires else "never"
        state, scopes, models = key.state(now), ", ".join(key.scopes), ", ".join(key.models)
        table.add_row(key.id, key.name, scopes, models, state, expires, f"{requests:,}", f"{_tokens(uses, key):,}")
    Console(highlight=False).print(table)


def _tokens(uses: list[Use], key: Key) -> int:
    return sum(use.prompt_tokens + use.completion_tokens for use in uses if use.key == key.id)


def revoke_key(workspace: Workspace, key: str) -> None:
    """Make a key worthless."""
    folder = serving_folder(workspace)
    revoked = KeyStore(folder.keys).revoke(key)
    note_act(folder.audit, "key revoked", this_user(), key=revoked.id, name=revoked.name)
    Console(highlight=False).print(f"revoked {revoked.id} ({revoked.name})")
