"""Who may ask for what: the route's scope, the request's key, and where a browser may call from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from serving.exchange import Exchange
from serving.keys import Key, KeyStore, Scope
from serving.refusals import Refusal
from serving.spec import LOOPBACK, Access

RouteKind = Literal["page", "probe", "metrics", "models", "generate", "admin"]


@dataclass(frozen=True)
class Route:
    """What stands at a path: its methods, and the scope that its key needs (None: no key)."""

    kind: RouteKind
    methods: tuple[str, ...]
    scope: Scope | None


_GET, _POST = ("GET", "HEAD"), ("POST",)
ROUTES: dict[str, Route] = {
    "/": Route("page", _GET, None),
    "/playground": Route("page", _GET, None),
    "/health": Route("probe", _GET, None),
    "/ready": Route("probe", _GET, None),
    "/metrics": Route("metrics", _GET, "admin"),
    "/v1/models": Route("models", _GET, "models"),
    "/v1/chat/completions": Route("generate", _POST, "models"),
    "/v1/completions": Route("generate", _POST, "models"),
    "/tokenize": Route("generate", _POST, "models"),
    "/detokenize": Route("generate", _POST, "models"),
    "/usage": Route("admin", _GET, "models"),
    "/releases": Route("admin", _GET, "models"),
    "/admin/models": Route("admin", _POST, "admin"),
    "/admin/rollouts": Route("admin", _POST, "admin"),
    "/admin/rollback": Route("admin", _POST, "admin"),
    "/admin/keys": Route("admin", _GET, "admin"),
}
_MODEL = Route("models", _GET, "models")
_SCHEMES = ("http", "https")


def route_of(path: str, method: str) -> Route:
    """The route of a request.

    Raises:
        Refusal: 404 or 405, there is none.
    """
    route = _MODEL if path.startswith("/v1/models/") else ROUTES.get(path)
    if route is None:
        raise Refusal(404, f"there is nothing at {path[:200]}", "unknown_url")
    if method not in route.methods:
        allowed = ", ".join(route.methods)
        raise Refusal(405, f"{path} takes {allowed} alone", "method_not_allowed", headers={"allow": allowed})
    return route


class Doorkeeper:
    """Checks every request's key. Without keys, on the loopback alone, models are open and administration is not."""

    def __init__(self, access: Access, store: KeyStore) -> None:
        self._access = access
        self._store = store

    def admit(self, exchange: Exchange, route: Route) -> Key | None:
        """The request's key, or None where none is needed.

        Raises:
            Refusal: 401 without a valid key, 403 with one that is not meant for this, or from another page.
        """
        _check_origin(exchange)
        secret = _secret(exchange.header("authorization"))
        key = self._store.find(secret) if secret else None
        if route.scope is None:
            return key
        if key is None and route.scope == "models" and self.open:
            _check_host(exchange)
            return None
        if key is None:
            raise _unknown(bool(exchange.header("authorization")))
        if route.scope not in key.scopes and "admin" not in key.scopes:
            raise Refusal(403, f"this key lacks the scope '{route.scope}'", "insufficient_permissions")
        return key

    @property
    def open(self) -> bool:
        """Whether models answer without a key."""
        if self._access.keys == "required" or self._access.host not in LOOPBACK:
            return False
        return not self._store.any_active("models")


def check_model(key: Key | None, model: str) -> None:
    """Refuse a key that is not meant for this model.

    Raises:
        Refusal: 403.
    """
    if key is not None and not key.may_use(model):
        raise Refusal(403, f"this key is not meant for the model '{model}'", "insufficient_permissions", "model")


def _secret(header: str) -> str:
    kind, _, secret = header.partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


def _unknown(given: bool) -> Refusal:
    challenge = {"www-authenticate": "Bearer"}
    if given:
        return Refusal(
            401, "this API key is not valid: unknown, revoked or expired", "invalid_api_key", headers=challenge
        )
    message = "give an API key: Authorization: Bearer KEY; tenure keys create makes one"
    return Refusal(401, message, "missing_api_key", headers=challenge)


def _check_origin(exchange: Exchange) -> None:
    """No other page may call from a browser: cross-origin requests are off."""
    origin = exchange.header("origin")
    if not origin:
        return
    url = urlsplit(origin)
    if url.scheme not in _SCHEMES or url.netloc.lower() != exchange.header("host").lower():
        raise Refusal(403, "cross-origin requests are off", "cross_origin")


def _check_host(exchange: Exchange) -> None:
    """Without keys, a name that was made to point at the loopback (DNS rebinding) is not answered."""
    try:
        name = urlsplit(f"//{exchange.header('host')}").hostname
    except ValueError:
        name = None
    if name not in LOOPBACK:
        raise Refusal(403, "without a key only the loopback's own names are answered", "unknown_host")
