"""Registered models: which artifact goes by which name, in MLflow's registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.errors import fail
from training.evaluation.scorecard import Scorecard
from training.mlflow_store import client
from training.models import hash_folder
from training.spec import RunSpec
from training.tracking import tracking_id_of
from training.workspace import MERGED_FOLDER, RunFolder, Workspace


@dataclass(frozen=True)
class Registered:
    """One version of a registered model."""

    name: str
    version: str


def register(workspace: Workspace, run: RunFolder, spec: RunSpec, scorecard: Scorecard) -> Registered:
    """Make the run's artifact a version of the model named by its spec, with its verdict and hashes as tags."""
    from mlflow.exceptions import MlflowException

    store = client(workspace)
    try:
        store.create_registered_model(spec.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "run": run.id,
        "contract": scorecard.contract.verdict,
        "artifact_hash": scorecard.artifact_hash,
        "base_hash": scorecard.base_hash,
        **({"merged_hash": hash_folder(merged)} if (merged := run.artifact / MERGED_FOLDER).is_dir() else {}),
    }
    made = store.create_model_version(spec.name, source=run.artifact.as_uri(), run_id=tracking_id_of(run), tags=tags)
    return Registered(spec.name, str(made.version))


def registered_artifact(run: RunFolder, scorecard: Scorecard) -> Path:
    """The artifact of a run, unchanged since it was scored.

    Raises:
        TenureError: its files are not those that the scorecard speaks of.
    """
    if not run.artifact.is_dir():
        raise fail(f"run '{run.id}' has no artifact", str(run.path), f"tenure resume {run.id}")
    if hash_folder(run.artifact) != scorecard.artifact_hash:
        what = "the artifact's files have changed since they were scored"
        raise fail(what, str(run.artifact), "restore them, or train again: only what was scored is served")
    return run.artifact
