"""The workspace's MLflow store, which holds runs, models and aliases."""

from __future__ import annotations

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
    return MlflowClient(tracking_uri=workspace.tracking_uri)
