"""The event log of a run: what happened to it, one JSON object a line, readable while it goes on."""

from __future__ import annotations

import json
import time
from typing import Any

from training.workspace import RunFolder


def log_event(run: RunFolder, event: str, **about: Any) -> None:
    """Append an event with the time, in seconds since 1970, to a run's events.jsonl."""
    line = json.dumps({"time_s": round(time.time(), 3), "event": event, **about}, ensure_ascii=False)
    with run.events.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def read_events(run: RunFolder) -> list[dict[str, Any]]:
    """All whole lines of a run's event log."""
    if not run.events.is_file():
        return []
    text = run.events.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
