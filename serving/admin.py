"""Administration of a running endpoint: models, rollouts, rollbacks, keys, usage; and what it asks its engines."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.artifacts import artifact_problems
from serving.audit import note_act
from serving.canary import Canary, loss
from serving.catalog import Alias, Catalog, Rollout, Served, Step, Watch
from serving.exchange import App, Exchange, parse_body, read_body
from serving.refusals import Refusal
from serving.remote import copied, is_remote
from serving.rollout import is_running, settled, stopped

if TYPE_CHECKING:
    from serving.gate import Gate

_ENGINES_S = 5.0
STEPS = (
    Step(share=0.05, seconds=30, requests=20),
    Step(share=0.25, seconds=30, requests=50),
    Step(share=1.0, seconds=0, requests=0),
)


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewModel(_Asked):
    """A model that joins the endpoint."""

    model: Served


class NewRollout(_Asked):
    """A model that is to take over an alias; with no steps, at once."""

    alias: str
    model: str
    steps: tuple[Step, ...] = STEPS
    shadow: float = Field(default=0.0, ge=0, le=1)
    watch: Watch = Watch()
    canary: Canary | None = None


class Back(_Asked):
    """An alias that is to go back to the model before, or to a named one."""

    alias: str
    to: str | None = None
    reason: str = ""


async def within(seconds: float, answering: Coroutine[Any, Any, None]) -> None:
    """Wait for an answer this long.

    Raises:
        Refusal: 504, it took longer; the generation is stopped.
    """
    try:
        async with asyncio.timeout(seconds):
            await answering
    except TimeoutError:
        raise Refusal(504, f"the answer took longer than {seconds:g} s", "timeout") from None


async def act(gate: Gate, exchange: Exchange) -> None:
    """Answer a request to an administrative path; every act is written to the audit log."""
    answer: Any
    if exchange.path in _SHOWN:
        answer = _SHOWN[exchange.path](gate, exchange)
    else:
        limits = gate.access.limits
        asked = parse_body(await read_body(exchange, limits.max_body_bytes, limits.body_timeout_s))
        answer = await _ACTS[exchange.path](gate, exchange, asked)
    await exchange.reply(200, json.dumps(answer).encode())


async def _add_model(gate: Gate, exchange: Exchange, asked: dict[str, Any]) -> Any:
    model = _checked(NewModel, asked).model
    _check_name(model.name)
    catalog = gate.catalog.read()
    known = catalog.models.get(model.name, model)
    if model.name in catalog.aliases or model.path not in (known.path, known.source):
        raise Refusal(409, f"'{model.name}' names another model of this endpoint", "name_taken", "model")
    if known.source is not None:
        return {"added": model.name}
    model = await asyncio.to_thread(_fit, model, catalog, gate.folder.adapters)
    gate.catalog.change(lambda found: found.with_model(model))
    note_act(gate.folder.audit, "model added", exchange.key_id, model=model.name, path=model.source or model.path)
    return {"added": model.name}


def _fit(model: Served, catalog: Catalog, folder: Path) -> Served:
    """The model, if a running engine can load it; copied here where it lies in a store."""
    local = model
    if is_remote(model.path):
        local = model.model_copy(update={"path": str(copied(model.path, folder)), "source": model.path})
    try:
        _check_adapter(local, catalog)
    except Refusal:
        if local is not model:
            shutil.rmtree(local.path)
        raise
    return local


def _check_adapter(model: Served, catalog: Catalog) -> None:
    """Refuse what no running engine could load.

    Raises:
        Refusal: it is a whole model, its base is not served, its rank too high, or its files do not fit the base.
    """
    if model.base is None:
        message = "a whole model needs an engine of its own: name it in the serving spec and start the endpoint anew"
        raise Refusal(400, message, "needs_an_engine", "model")
    base = catalog.models.get(model.base)
    if base is None or base.base is not None:
        raise Refusal(400, f"the adapter's base '{model.base}' is not served here", "unknown_base", "model")
    problems = artifact_problems(Path(model.path), Path(base.path))
    if problems:
        raise Refusal(400, "; ".join(problem.what for problem in problems), "unfit_artifact", "model")
    rank = int(json.loads((Path(model.path) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    if base.max_rank is None or rank > max(base.max_rank, 8):  # an engine has room for rank 8 at least
        bound = "none" if base.max_rank is None else f"adapters up to rank {base.max_rank}"
        message = f"the adapter has rank {rank}, and the engine of '{base.name}' takes {bound}"
        raise Refusal(409, f"{message}: start the endpoint anew with it", "rank_too_high", "model")


async def _start_rollout(gate: Gate, exchange: Exchange, asked: dict[str, Any]) -> Any:
    wanted = _checked(NewRollout, asked)
    _check_name(wanted.alias)
    _with_rollout(gate.catalog.read(), wanted)  # refuse what cannot be, before any question is asked
    why = await _canary_loss(gate, wanted)
    if why:
        changed = gate.catalog.change(lambda catalog: _sent_back(catalog, wanted, why))
        told = {"alias": wanted.alias, "model": wanted.model, "why": why}
        note_act(gate.folder.audit, "rollout rolled back", exchange.key_id, **told)
        return changed.aliases[wanted.alias].model_dump(mode="json")
    gate.conductor.forget(wanted.alias)
    changed = gate.catalog.change(lambda catalog: _with_rollout(catalog, wanted))
    note_act(gate.folder.audit, "rollout started", exchange.key_id, alias=wanted.alias, model=wanted.model)
    return changed.aliases[wanted.alias].model_dump(mode="json")


async def _canary_loss(gate: Gate, wanted: NewRollout) -> str:
    """Why a rollout has to go back before it gets a request; empty where nothing speaks against it."""
    before = gate.catalog.read().aliases.get(wanted.alias)
    if wanted.canary is None or before is None or before.current == wanted.model:
        return ""
    return await loss(wanted.canary, before.current, wanted.model, gate.app)


def _sent_back(catalog: Catalog, wanted: NewRollout, why: str) -> Catalog:
    """The rollout as one that was taken back before its first step."""
    steps = wanted.steps or STEPS[-1:]
    alias = _with_rollout(catalog, wanted.model_copy(update={"steps": steps})).aliases[wanted.alias]
    return catalog.with_alias(stopped(alias, why, time.time()))


def _with_rollout(catalog: Catalog, wanted: NewRollout) -> Catalog:
    if wanted.model not in catalog.models:
        raise Refusal(404, f"the model '{wanted.model}' is not served here", "model_not_found", "model")
    if wanted.alias in catalog.models:
        raise Refusal(409, f"'{wanted.alias}' is a model's own name", "name_taken", "alias")
    alias = catalog.aliases.get(wanted.alias)
    if alias is None:
        return catalog.with_alias(Alias(name=wanted.alias, current=wanted.model))
    if is_running(alias):
        raise Refusal(409, f"a rollout of '{wanted.alias}' is under way", "rollout_running", "alias")
    if alias.current == wanted.model:
        return catalog
    if not wanted.steps:
        return catalog.with_alias(settled(alias, wanted.model))
    rollout = Rollout(
        candidate=wanted.model,
        steps=wanted.steps,
        since=time.time(),
        shadow=wanted.shadow,
        watch=wanted.watch,
        state="shadow" if wanted.shadow else "rolling",
    )
    return catalog.with_alias(alias.model_copy(update={"rollout": rollout}))


async def _roll_back(gate: Gate, exchange: Exchange, asked: dict[str, Any]) -> Any:
    wanted = _checked(Back, asked)
    changed = gate.catalog.change(lambda catalog: _gone_back(catalog, wanted))
    current = changed.aliases[wanted.alias].current
    note_act(gate.folder.audit, "rolled back", exchange.key_id, alias=wanted.alias, model=current, why=wanted.reason)
    return changed.aliases[wanted.alias].model_dump(mode="json")


def _gone_back(catalog: Catalog, wanted: Back) -> Catalog:
    alias = catalog.aliases.get(wanted.alias)
    if alias is None:
        raise Refusal(404, f"there is no alias '{wanted.alias}'", "alias_not_found", "alias")
    if is_running(alias) and wanted.to in (None, alias.current):
        return catalog.with_alias(stopped(alias, wanted.reason or "asked for", time.time()))
    to = wanted.to or next(iter(alias.previous), None)
    if to is None:
        raise Refusal(409, f"'{wanted.alias}' has no model to go back to", "no_previous", "alias")
    if to not in catalog.models:
        raise Refusal(404, f"the model '{to}' is not served here", "model_not_found", "to")
    before = tuple(name for name in alias.previous if name != to)
    return catalog.with_alias(Alias(name=alias.name, current=to, previous=before))


def _keys(gate: Gate, exchange: Exchange) -> Any:
    now = time.time()
    return {"keys": [asdict(key) | {"state": key.state(now)} for key in gate.keys.all()]}


def _usage(gate: Gate, exchange: Exchange) -> Any:
    """The use of the request's own key, or of all for administration."""
    whole = exchange.key is not None and "admin" in exchange.key.scopes
    uses = gate.keys.used(None if whole else exchange.key_id)
    return {"usage": [asdict(use) for use in uses], "cost": asdict(gate.meter.cost(gate.access.price_per_hour))}


def _releases(gate: Gate, exchange: Exchange) -> Any:
    """Aliases and models that the key may use, with what the page shows of them."""
    catalog = gate.catalog.read()
    may = (
        exchange.key.may_use if exchange.key is not None and "admin" not in exchange.key.scopes else (lambda name: True)
    )
    aliases = [alias.model_dump(mode="json") for alias in catalog.aliases.values() if may(alias.name)]
    hidden = {"path": True, "application": True, "source": True}
    models = [model.model_dump(mode="json", exclude=hidden) for model in catalog.models.values() if may(model.name)]
    return {"aliases": aliases, "models": models}


def _check_name(name: str) -> None:
    if not 0 < len(name) <= 200 or ":" in name or ".." in name or name.startswith("/") or not name.isprintable():
        raise Refusal(400, f"{name[:100]!r} cannot name a model", "invalid_name", "model")


def _checked(kind: type[Any], asked: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(400, f"{where}: {first['msg']}", "invalid_value", where or None) from None


_SHOWN: dict[str, Callable[[Gate, Exchange], Any]] = {"/admin/keys": _keys, "/usage": _usage, "/releases": _releases}
_ACTS: dict[str, Callable[[Gate, Exchange, dict[str, Any]], Awaitable[Any]]] = {
    "/admin/models": _add_model,
    "/admin/rollouts": _start_rollout,
    "/admin/rollback": _roll_back,
}


async def engine_metrics(app: App) -> bytes:
    """The engines' own metrics; nothing while they do not answer."""
    found = await _ask_inside(app, "/engines/metrics")
    return found.content if found is not None and found.status_code == 200 else b""


async def engines_ready(gate: Gate) -> bool:
    """Whether every engine answers its health check."""
    found = await _ask_inside(gate.app, "/engines/health")
    return found is not None and found.status_code == 200


async def _ask_inside(app: App, path: str) -> httpx.Response | None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:
        try:
            async with asyncio.timeout(_ENGINES_S):
                return await client.get(path)
        except TimeoutError:
            return None
