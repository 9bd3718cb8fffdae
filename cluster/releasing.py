"""`tenure promote`, `releases`, `rollout` and `rollback`: what goes by an alias, in registry and endpoint."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster.keys import serving_folder
from serving.audit import note_act, this_user
from serving.canary import read_items
from serving.client import connect
from serving.endpoint import TOLERANCES
from serving.parity import check_parity
from serving.releases import Release, check_alias, current_release, promote, releases, roll_back
from training.errors import fail
from training.stages import spec_of
from training.workspace import RunFolder, Workspace, read_json

DEFAULT_ALIAS = "production"
_ASK_S = 300.0  # a canary suite is asked meanwhile
_POLL_S = 1.0


@dataclass(frozen=True)
class Plan:
    """The steps of a rollout: shares of requests before the last, which is all; and a shadow before them."""

    shares: tuple[float, ...]
    seconds: float
    requests: int
    shadow: float
    at_once: bool
    canary: Path | None = None
    max_canary_loss: float = 0.0

    @property
    def steps(self) -> list[dict[str, float | int]]:
        """As the endpoint takes them; none means at once."""
        if self.at_once:
            return []
        shares = [*self.shares, *([] if 1.0 in self.shares else [1.0])]
        return [{"share": share, "seconds": self.seconds, "requests": self.requests} for share in shares]

    def asked(self, alias: str, model: str) -> dict[str, Any]:
        """The request to the endpoint."""
        told = {"alias": alias, "model": model, "steps": self.steps, "shadow": self.shadow}
        if self.canary is None:
            return told
        return told | {"canary": {"items": read_items(self.canary), "max_loss": self.max_canary_loss}}


def promote_named(name: str, workspace: Workspace, alias: str | None, override: str | None) -> None:
    """Promote a run, or register a sweep's winner and, where an alias is given, promote it, too."""
    from cluster.sweep_report import is_sweep_id

    if alias is not None:
        check_alias(alias)
    if is_sweep_id(workspace, name):
        from cluster.sweep import promote_sweep

        run = promote_sweep(name, workspace)
        if alias is None:
            return
    else:
        run = workspace.run(name)
    _promote_run(run, workspace, alias or DEFAULT_ALIAS, override)


def _promote_run(run: RunFolder, workspace: Workspace, alias: str, override: str | None) -> None:
    release = promote(workspace, run, spec_of(run), alias, override, this_user())
    audit = serving_folder(workspace).audit
    told = {"alias": alias, "run": run.id, "contract": release.verdict, "override": override}
    note_act(audit, "promoted", this_user(), **told)
    console = Console(highlight=False)
    console.print(
        f"{alias} is now {release.model} version {release.version}, run {run.id} (contract {release.verdict})"
    )
    if override:
        console.print(f"the contract was overridden: {override}")
    console.print(f"serve it with: tenure serve {alias}; at a running endpoint: tenure rollout {alias}")


def print_releases(workspace: Workspace) -> None:
    """All releases, the newest first."""
    table = Table("alias", "", "run", "model", "contract", "promoted", "override", box=None)
    for found in releases(workspace):
        mark = "current" if found.current else ""
        model = f"{found.model} {found.version}"
        table.add_row(found.alias, mark, found.run, model, found.verdict, found.promoted[:19], found.override)
    Console(highlight=False).print(table)


def roll_back_alias(alias: str, workspace: Workspace, to: str | None, reason: str) -> None:
    """Give an alias back, at the endpoint first, where requests suffer."""
    console = Console(highlight=False)
    history = releases(workspace, alias)
    now = next((release for release in history if release.current), None)
    target = to or next((release.run for release in history if not release.current), None)
    with _endpoint(workspace) as endpoint:
        if endpoint is not None and now is not None and target is not None and _serves(endpoint, alias):
            _bring(endpoint, workspace.run(target), workspace)
            endpoint.post("/admin/rollback", {"alias": alias, "to": target, "reason": reason})
            console.print(f"the endpoint answers {alias} with {target} again")
    gone, back = roll_back(workspace, alias, reason, to)
    told = {"alias": alias, "run": back.run, "from": gone.run, "why": reason}
    note_act(serving_folder(workspace).audit, "rolled back in the registry", this_user(), **told)
    console.print(f"{alias} is {back.model} version {back.version}, run {back.run}, again")


def roll_out(alias: str, workspace: Workspace, plan: Plan, *, wait: bool) -> bool:
    """Bring an alias's release to the running endpoint; whether it was not sent back.

    Raises:
        TenureError: no endpoint runs, nothing goes by the alias, the model cannot join the endpoint, or it does not
            answer as it did when it was scored.
    """
    console = Console(highlight=False)
    release = current_release(workspace, alias)
    if release is None:
        raise fail(f"nothing goes by the alias '{alias}'", "", "tenure promote RUN --as makes a release")
    asked = plan.asked(alias, release.run)
    with _endpoint(workspace) as endpoint:
        if endpoint is None:
            raise fail("no endpoint of this workspace runs", str(workspace.root), f"tenure serve {alias}")
        largest = _bring(endpoint, workspace.run(release.run), workspace)
        console.print(f"{release.run} answers as it did when it was scored (within {largest:.1e} nats)")
        endpoint.post("/admin/rollouts", asked)
        return not wait or _follow(endpoint, alias, release, console)


def _follow(endpoint: _Endpoint, alias: str, release: Release, console: Console) -> bool:
    """Tell of every step until the rollout has ended."""
    told = ""
    while True:
        found = next(entry for entry in endpoint.get("/releases")["aliases"] if entry["name"] == alias)
        rollout = found["rollout"]
        if rollout is None or rollout["state"] in ("done", "rolled_back"):
            break
        share = rollout["steps"][rollout["at"]]["share"]
        line = "copies of requests alone" if rollout["state"] == "shadow" else f"{share:.0%} of requests"
        if line != told:
            console.print(f"{release.run} gets {line}")
            told = line
        time.sleep(_POLL_S)
    if rollout is not None and rollout["state"] == "rolled_back":
        console.print(f"[red]sent back[/]: {rollout['reason']}; {alias} is still {found['current']}")
        return False
    console.print(f"{alias} is {found['current']}")
    return True


def _bring(endpoint: _Endpoint, run: RunFolder, workspace: Workspace) -> float:
    """Add a run's model to the endpoint, if it is not there, and compare it with what was scored; nats at most."""
    from cluster.serving import servable

    model = servable(run)
    if run.id not in endpoint.models:
        if model.rank is None:
            what = f"run '{run.id}' is a whole model, which needs an engine of its own"
            raise fail(what, "", "name it in the serving spec and start the endpoint anew; adapters join while it runs")
        entry = {"name": run.id, "path": str(model.path), "base": model.base.name, "run": run.id, "card": model.card}
        endpoint.post("/admin/models", {"model": {**entry, "created": int(time.time())}})
    dtype = "bfloat16" if model.spec.scaling.gpus_per_worker else "float32"
    with connect(endpoint.url, secret=endpoint.secret, certificate=endpoint.certificate) as client:
        return check_parity(client, run.id, model.scorecard.probes["tuned"], TOLERANCES[dtype]).largest


def _serves(endpoint: _Endpoint, alias: str) -> bool:
    return any(entry["name"] == alias for entry in endpoint.get("/releases")["aliases"])


@dataclass(frozen=True)
class _Endpoint:
    """The workspace's running endpoint, asked with its own key of administration."""

    url: str
    secret: str
    client: httpx.Client
    certificate: Path | None = None

    @property
    def models(self) -> set[str]:
        return {entry["name"] for entry in self.get("/releases")["models"]}

    def get(self, path: str) -> Any:
        return self._told(self.client.get(path))

    def post(self, path: str, asked: dict[str, Any]) -> Any:
        return self._told(self.client.post(path, json=asked))

    def _told(self, reply: httpx.Response) -> Any:
        if reply.status_code >= 400:
            raise fail(f"the endpoint refused: {reply.json()['error']['message']}", str(reply.url))
        return reply.json()


@contextmanager
def _endpoint(workspace: Workspace) -> Iterator[_Endpoint | None]:
    """The endpoint that serves this workspace on this machine, or None when none does."""
    file = serving_folder(workspace).endpoint
    told = read_json(file) if file.is_file() else None
    if told is None or not _lives(int(told["pid"])):
        yield None
        return
    headers = {"authorization": f"Bearer {told['key']}"}
    url = str(told["url"])
    root = url.removesuffix("/v1")
    certificate = Path(told["certificate"]) if told.get("certificate") else None
    trusted = ssl.create_default_context(cafile=str(certificate)) if certificate else True
    with httpx.Client(base_url=root, headers=headers, timeout=_ASK_S, trust_env=False, verify=trusted) as client:
        yield _Endpoint(url, str(told["key"]), client, certificate)


def _lives(pid: int) -> bool:
    """Whether a process of this machine is there; signal 0 only asks."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
