"""The gate in front of the engine's ingress: every request passes it, from its id to its line in the log.

One request's way: an id, its route, its key, its body within bounds, its model, its key's rates, a fair turn, filters,
the engine, filters again, the quotas, the metrics, the log. It is plain ASGI and needs neither Ray nor vLLM.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from serving import admin, page
from serving.access import Doorkeeper, Route, check_model, route_of
from serving.catalog import Catalog, CatalogFile
from serving.cost import Meter
from serving.exchange import App, Exchange, Json, Receive, Scope, Send, check_counts, forward, parse_body, read_body
from serving.files import ServingFolder
from serving.keys import KeyStore, Quota
from serving.listing import list_models
from serving.metrics import Metrics
from serving.moderation import Moderation
from serving.queueing import FairQueue
from serving.rates import Rates
from serving.refusals import Refusal, refusal_of
from serving.request_log import RequestLog
from serving.rollout import Conductor
from serving.spec import Access

_ID = re.compile(r"[\w.-]{1,128}")
_NO_QUOTA = Quota()


class Gate:
    """An ASGI app around the ingress's own."""

    def __init__(self, app: App, access: Access) -> None:
        self.app = app
        self.access = access
        folder = ServingFolder(access.folder)
        limits = access.limits
        self.folder = folder
        self.keys = KeyStore(folder.keys)
        self.catalog = CatalogFile(folder.catalog)
        self.queue = FairQueue(limits.max_running, limits.max_waiting, limits.max_wait_s)
        self.metrics = Metrics(self.queue)
        self.rates = Rates(
            Quota(limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day), self.keys
        )
        self.conductor = Conductor(self.catalog, folder.audit)
        self.moderation = Moderation(access.moderation)
        self.meter = Meter()
        self._door = Doorkeeper(access, self.keys)
        self._log = RequestLog(folder.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(Exchange(scope, receive, send, _id_of(scope)))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._answer(exchange)
        except Exception as error:
            await exchange.refuse(refusal_of(error))
        finally:
            self._note(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        route = route_of(exchange.path, str(exchange.scope["method"]))
        exchange.key = self._door.admit(exchange, route)
        await _KINDS[route.kind](self, exchange, route)

    async def _generate(self, exchange: Exchange, route: Route) -> None:
        limits = self.access.limits
        request = parse_body(await read_body(exchange, limits.max_body_bytes, limits.body_timeout_s))
        check_counts(request)
        catalog = self.catalog.read()
        exchange.model = _model_in(request, catalog)
        check_model(exchange.key, exchange.model)
        quota = exchange.key.quota if exchange.key else _NO_QUOTA
        exchange.headers |= self.rates.admit(exchange.key_id, quota)
        async with self.queue.turn(exchange.key_id):
            await self._ask(exchange, request, catalog)

    async def _ask(self, exchange: Exchange, request: Json, catalog: Catalog) -> None:
        request = await self.moderation.check_input(exchange, request, self.app)
        exchange.target = self.conductor.target_of(exchange.model, catalog)
        request = {**request, "model": exchange.target}
        filtering = self.moderation.of_answer(exchange, request, self.app)
        mirrored = self.conductor.mirror(exchange, request, catalog, self.app)
        self.meter.begin()
        try:
            await admin.within(self.access.limits.request_timeout_s, forward(self.app, exchange, request, filtering))
        finally:
            self.meter.end(exchange.prompt_tokens + exchange.completion_tokens)
            self.conductor.observe(exchange)
            if mirrored is not None:
                mirrored()

    async def _models(self, exchange: Exchange, route: Route) -> None:
        await exchange.reply(200, list_models(self.catalog.read(), exchange.key, exchange.path))

    async def _metrics(self, exchange: Exchange, route: Route) -> None:
        text = self.metrics.text() + await admin.engine_metrics(self.app)
        await exchange.reply(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def _probe(self, exchange: Exchange, route: Route) -> None:
        if exchange.path == "/ready" and not await admin.engines_ready(self):
            raise Refusal(503, "an engine is not ready", "not_ready", headers={"retry-after": "1"})
        await exchange.reply(200, b'{"status": "ok"}')

    async def _page(self, exchange: Exchange, route: Route) -> None:
        await exchange.reply(200, page.playground(), "text/html; charset=utf-8", page.HEADERS)

    async def _admin(self, exchange: Exchange, route: Route) -> None:
        await admin.act(self, exchange)

    def _note(self, exchange: Exchange) -> None:
        known = exchange.model if exchange.model in self.catalog.read().names else ""
        quota = exchange.key.quota if exchange.key else _NO_QUOTA
        if exchange.target:
            self.rates.spend(exchange.key_id, quota, exchange.prompt_tokens + exchange.completion_tokens)
            self.keys.note(exchange.key_id, known, exchange.prompt_tokens, exchange.completion_tokens)
        self.metrics.note(exchange, known)
        self._log.note(exchange)


_KINDS: dict[str, Callable[[Gate, Exchange, Route], Awaitable[None]]] = {
    "generate": Gate._generate,
    "models": Gate._models,
    "metrics": Gate._metrics,
    "probe": Gate._probe,
    "page": Gate._page,
    "admin": Gate._admin,
}


def _id_of(scope: Scope) -> str:
    """The client's request id where it is a harmless one, or a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"x-request-id"), "")
    return given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _model_in(request: dict[str, Any], catalog: Catalog) -> str:
    """The model that a request names.

    Raises:
        Refusal: 400 when it names none, 404 when there is none of this name.
    """
    model = request.get("model")
    if model is None:
        raise Refusal(400, "you must provide a model parameter", "missing_required_parameter", "model")
    if not isinstance(model, str):
        raise Refusal(400, "model must be a string", "invalid_type", "model")
    if model not in catalog.models and model not in catalog.aliases:
        shown = model if len(model) <= 100 else model[:97] + "..."
        raise Refusal(
            404, f"the model '{shown}' does not exist; GET /v1/models lists those that do", "model_not_found", "model"
        )
    return model
