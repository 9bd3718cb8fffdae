"""What a run needs computed once before its training: each aid is cached by content and shared by all runs.

An aid is a file or folder that workers read; its name in the job says what it is.
"""

from __future__ import annotations

from pathlib import Path

from cluster.importance import ready_importances
from training.plan import Plan
from training.spec import RunSpec
from training.workspace import Workspace


def ready_aids(
    spec: RunSpec, plan: Plan, prepared: Path, workspace: Workspace, logs: Path, memory_limit: int | None
) -> dict[str, str]:
    """The paths of a run's aids by name, made where they are missing. Ray is connected by the caller.

    Args:
        logs: where the processes that make them write.
        memory_limit: bytes that one worker may take, or None where that is not known.
    """
    return ready_importances(spec, workspace, logs, memory_limit)
