"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120


def run_tenure(
    folder: Path, *arguments: str, workspace: Path | None = None, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`tenure ARGUMENTS` in a folder, in its workspace/ unless another is given, with the hub out of reach.

    `within` is a command that runs the rest of its arguments.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    environment["TENURE_WORKSPACE"] = str(workspace or folder / "workspace")
    command = [*within, sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
