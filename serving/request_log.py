"""One JSON line a request: who, what, how long, how many tokens; never a key's secret, a prompt or an answer."""

from __future__ import annotations

import json
import logging
import logging.handlers
from datetime import UTC, datetime
from pathlib import Path

from serving.exchange import Exchange

_LARGEST = 64 * 2**20
_KEPT = 4


class RequestLog:
    """Lines in a file that turns over at 64 MiB; four old ones are kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.handlers.RotatingFileHandler(path, "a", _LARGEST, _KEPT, "utf-8", delay=True)

    def note(self, exchange: Exchange) -> None:
        """Write the line of a request that has come to its end."""
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": exchange.id,
            "key": exchange.key_id,
            "method": exchange.scope["method"],
            "path": exchange.path[:200],
            "model": exchange.model[:200],
            "target": exchange.target,
            "status": exchange.status,
            "code": exchange.code,
            "ms": round(1000 * exchange.seconds, 1),
            "first_token_ms": None if exchange.first_s is None else round(1000 * exchange.first_s, 1),
            "prompt_tokens": exchange.prompt_tokens,
            "completion_tokens": exchange.completion_tokens,
            "interventions": exchange.interventions,
        }
        record = logging.LogRecord("tenure", logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), (), None)
        self._handler.emit(record)
