"""The audit log: one JSON line for every administrative act, whoever did it and however it ended."""

from __future__ import annotations

import getpass
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def note_act(path: Path, act: str, by: str, /, **details: Any) -> None:
    """Append one act. `by` is a key's id, or a user of this machine."""
    line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "act": act, "by": by, **details}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_acts(path: Path) -> list[dict[str, Any]]:
    """All acts, the oldest first."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def this_user() -> str:
    """Who runs this process."""
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError):
        return f"user {os.getuid()}"
