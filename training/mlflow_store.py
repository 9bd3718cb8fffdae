"""The workspace's MLflow store, which holds runs, models and aliases."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from training.quiet import be_quiet
from training.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def client(workspace: Workspace) -> MlflowClient:
    """A client of the workspace's store (or of $MLFLOW_TRACKING_URI); telemetry and its log are off."""
    be_quiet()
    from mlflow.tracking import MlflowClient

    workspace.root.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(workspace.root / ".mlflow.lock"):
        return MlflowClient(tracking_uri=workspace.tracking_uri)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Runs that begin together must not make the store's tables at once: the later one fails half-way."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
