"""Refusals in OpenAI's form: one JSON error, the right status, no traceback."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Headers = Mapping[str, str]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_RETRY_S = 1
_LONGEST = 2000
log = logging.getLogger("tenure.serving")


@dataclass
class Refusal(Exception):
    """Why a request is not answered: the status, and what OpenAI's error object says."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Headers = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def body(self) -> bytes:
        """The error object as JSON."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()


def retry_later(status: int, message: str, code: str, after_s: float = _RETRY_S) -> Refusal:
    """A refusal that tells the client when to come back, in whole seconds."""
    return Refusal(status, message, code, headers={"retry-after": str(max(1, round(after_s + 0.5)))})


def refusal_of(error: BaseException) -> Refusal:
    """What to tell a client of an exception; what is not the client's fault is logged and told without details."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):  # Ray wraps what a replica raised
        error = inner
    if isinstance(error, Refusal):
        return error
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        said = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
        return Refusal(status, _one_line(str(said)), _code(status))
    if is_gone(error):
        return retry_later(503, "the model's engine is not available at the moment", "unavailable")
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed to answer; see its log under this request's id", "internal_error")


def is_gone(error: BaseException) -> bool:
    """Whether an engine's replica died, or cannot be reached."""
    return any(kind.__name__ in _UNAVAILABLE for kind in type(error).__mro__)


# Names of Ray's, vLLM's and serving.wire's exceptions, so that this module needs none of them.
_UNAVAILABLE = frozenset(
    {
        "ActorDiedError",
        "ActorUnavailableError",
        "BackPressureError",
        "DeploymentUnavailableError",
        "EngineDeadError",
        "EngineGoneError",
        "RayActorError",
        "ReplicaUnavailableError",
        "WorkerCrashedError",
    }
)


def refusal_in(status: int, body: bytes) -> Refusal:
    """The refusal in an error response of the engine's ingress, which has several forms of its own."""
    if status >= 500:
        log.error("the engine's ingress answered HTTP %d: %s", status, body[:_LONGEST].decode(errors="replace"))
        if status == 503:
            return retry_later(503, "the model's engine is not available at the moment", "unavailable")
        return Refusal(500, "the server failed to answer; see its log under this request's id", "internal_error")
    message, param = _said(body)
    status = 400 if status == 422 else status
    return Refusal(status, _one_line(message), _code(status, message), param)


def _said(body: bytes) -> tuple[str, str | None]:
    """Message and parameter."""
    try:
        told: Any = json.loads(body)
    except ValueError:
        return body.decode(errors="replace"), None
    if isinstance(told, dict) and isinstance(told.get("error"), dict):
        return str(told["error"].get("message", "")), _text(told["error"].get("param"))
    detail = told.get("detail", told) if isinstance(told, dict) else told
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        place = [str(part) for part in detail[0].get("loc", ()) if part != "body"]
        where = next((part for part in place if part.isidentifier()), None)
        return f"{'.'.join(place)}: {detail[0].get('msg', 'is not valid')}".removeprefix(": "), where
    return str(detail), None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _one_line(message: str) -> str:
    """Without a traceback, and not endless."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return " ".join(lines)[:_LONGEST] or "the request is not valid"


def _code(status: int, message: str = "") -> str | None:
    if status == 400 and ("maximum context length" in message or "max_model_len" in message):
        return "context_length_exceeded"
    return {404: "model_not_found", 400: "invalid_value"}.get(status)
