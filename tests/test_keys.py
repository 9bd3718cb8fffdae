"""API keys by the command line: made once, listed without secrets, revoked, audited."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from serving.audit import read_acts
from serving.keys import DAY_S, KeyStore, Quota
from training.errors import TenureError


def tenure(workspace: Path, *arguments: str) -> str:
    done = CliRunner().invoke(cli, ["--workspace", str(workspace), "keys", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    secret = tenure(
        tmp_path, "create", "team-a", "--model", "support-*", "--days", "2", "--tokens-per-day", "9"
    ).strip()
    store = KeyStore(tmp_path / "serving" / "keys.db")
    key = store.find(secret)
    assert key is not None
    assert (key.name, key.models, key.scopes, key.quota) == (
        "team-a",
        ("support-*",),
        ("models",),
        Quota(tokens_per_day=9),
    )
    assert key.may_use("support-1")
    assert not key.may_use("other")
    (row,) = json.loads(tenure(tmp_path, "list", "--json"))
    assert (row["id"], row["state"]) == (key.id, "active")
    listed = tenure(tmp_path, "list")
    assert key.id in listed
    assert secret not in listed
    tenure(tmp_path, "revoke", key.id)
    assert store.find(secret) is None
    acts = read_acts(tmp_path / "serving" / "audit.jsonl")
    assert [act["act"] for act in acts] == ["key created", "key revoked"]
    assert secret not in json.dumps(acts)
    assert stat.S_IMODE((tmp_path / "serving" / "audit.jsonl").stat().st_mode) == 0o600


def test_a_key_ends_with_its_time(tmp_path: Path) -> None:
    now = [1000.0]
    store = KeyStore(tmp_path / "keys.db", clock=lambda: now[0])
    key, secret = store.create("k", lasts_s=60.0)
    assert store.find(secret) == key
    now[0] += 60
    assert store.find(secret) is None
    assert key.state(now[0]) == "expired"
    assert not store.any_active()


def test_use_is_counted_by_day_and_model(tmp_path: Path) -> None:
    now = [10 * DAY_S + 5.0]
    store = KeyStore(tmp_path / "keys.db", clock=lambda: now[0])
    for model in ("a", "a", "b"):
        store.note("k", model, 3, 4)
    assert store.tokens_today("k") == 21
    assert [(use.model, use.requests, use.prompt_tokens) for use in store.used("k")] == [("a", 2, 6), ("b", 1, 3)]
    now[0] += DAY_S
    assert store.tokens_today("k") == 0
    assert store.seconds_to_midnight() == DAY_S - 5


def test_an_unknown_key_cannot_be_revoked(tmp_path: Path) -> None:
    with pytest.raises(TenureError, match="no key 'nobody'"):
        KeyStore(tmp_path / "keys.db").revoke("nobody")
