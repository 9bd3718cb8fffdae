"""Runs, metrics, artifacts, lineage and registered models in MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.locations import hash_data
from training.errors import fail
from training.evaluation.judge import package_versions
from training.evaluation.scorecard import Scorecard
from training.lineage import run_of_model
from training.mlflow_store import client
from training.models import hash_folder
from training.plan import Plan
from training.quiet import be_quiet
from training.reporting.curves import PARTS, read_metrics, task_totals
from training.spec import RunSpec
from training.strategy import Distill, Replay
from training.workspace import RunFolder, Workspace, read_json, write_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "tenure"


def collect_lineage(spec: RunSpec, spec_hash: str) -> dict[str, Any]:
    """Everything that a run came from: hashes of data, base model and spec, package versions, commit."""
    sources = [source.path for source in spec.data.train]
    suites = [suite.path for suite in spec.suites.all]
    models = {"base_model": spec.model}
    if isinstance(spec.objective, Distill):
        models["teacher"] = spec.objective.teacher
    replay = spec.protection(Replay)
    parent = run_of_model(Path(spec.model))
    return {
        "spec": spec_hash,
        **({"parent": {"run": parent}} if parent else {}),
        **{name: {"path": path, "sha256": hash_folder(Path(path))} for name, path in models.items()},
        "train": {str(path): hash_data(path) for path in sources},
        **({"replay": {str(path): hash_data(path) for path in replay.files}} if replay else {}),
        "suites": {str(path): hash_data(path) for path in suites},
        "packages": package_versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the working directory, or None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def start_tracking(
    workspace: Workspace,
    run: RunFolder,
    spec: RunSpec,
    plan: Plan,
    lineage: dict[str, Any],
    parent: str | None = None,
) -> str:
    """Open an MLflow run with the spec's parameters, the plan and the lineage; its id.

    Args:
        parent: the MLflow run that this one is a child of, such as a sweep's.

    Raises:
        TenureError: the store does not answer, or refuses.
    """
    be_quiet()
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    params = [Param(*pair) for pair in _flat({**spec.model_dump(mode="json"), "plan": vars(plan)})]
    tags = [RunTag(*pair) for pair in _flat(lineage, "lineage")]
    tags += [RunTag("mlflow.parentRunId", parent)] if parent else []
    try:
        store = client(workspace)
        tracking_id = str(store.create_run(experiment_of(store, workspace), run_name=run.id).info.run_id)
        for start in range(0, max(len(params), len(tags)), 100):
            store.log_batch(tracking_id, params=params[start : start + 100], tags=tags[start : start + 100])
    except MlflowException as error:
        what = f"the tracking store refused: {str(error).strip().splitlines()[0]}"
        raise fail(what, workspace.tracking_uri, "check MLFLOW_TRACKING_URI, or unset it") from error
    write_json(run.path / "tracking.json", {"mlflow_run_id": tracking_id, "uri": workspace.tracking_uri})
    return tracking_id


def experiment_of(store: MlflowClient, workspace: Workspace) -> str:
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = "MLFLOW_TRACKING_URI" not in os.environ
    location = (workspace.root / "mlartifacts").as_uri() if local else None
    try:
        return str(store.create_experiment(EXPERIMENT, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # made by a run that began at the same time
            raise
    return str(store.get_experiment_by_name(EXPERIMENT).experiment_id)


def log_metrics(workspace: Workspace, run: RunFolder, tracking_id: str) -> None:
    """Every step's and validation's numbers from the run's own metrics file; a repeated step counts once, last."""
    from mlflow.entities import Metric

    latest: dict[tuple[str, int], float] = {}
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "step":
            names = ("loss", *PARTS, "learning_rate", "grad_norm", "num_tokens", "seconds")
            latest |= {(name, row["step"]): row[name] for name in names if row.get(name) is not None}
            tasks = row.get("tasks", {}).items()
            latest |= {(f"task/{name}/loss", row["step"]): t["loss"] for name, t in tasks if t["loss"] is not None}
        elif row["kind"] == "validation":
            latest[f"validation/{row['suite']}", row["step"]] = row["loss"]
    stamp = int(run.metrics.stat().st_mtime * 1000)
    metrics = [Metric(name, value, stamp, step) for (name, step), value in latest.items()]
    store = client(workspace)
    for start in range(0, len(metrics), 500):
        store.log_batch(tracking_id, metrics=metrics[start : start + 500])


def finish_tracking(workspace: Workspace, run: RunFolder, tracking_id: str, scorecard: Scorecard) -> None:
    """Scores, verdict and the readable files of a finished run."""
    store = client(workspace)
    for suite in scorecard.suites:
        for name in ("base", "tuned", "change"):
            store.log_metric(tracking_id, f"{suite.role}/{suite.name}/{name}", getattr(suite, name))
    metrics = read_metrics(run.metrics)
    for task in task_totals(metrics) if metrics else ():
        for name in ("num_rows", "row_share", "num_target_tokens", "target_token_share"):
            store.log_metric(tracking_id, f"task/{task.name}/{name}", getattr(task, name))
    store.set_tag(tracking_id, "contract", scorecard.contract.verdict)
    store.set_tag(tracking_id, "artifact", str(run.artifact))
    for file in (run.spec_yaml, run.spec, run.plan, run.lineage, run.scorecard, run.report, run.metrics):
        if file.is_file():
            store.log_artifact(tracking_id, str(file))
    store.set_terminated(tracking_id, "FINISHED")


def fail_tracking(workspace: Workspace, tracking_id: str, reason: str) -> None:
    """Close a run that did not end well. A store that cannot be written (a full disk) is told of, and no more."""
    from mlflow.exceptions import MlflowException

    store = client(workspace)
    try:
        store.set_tag(tracking_id, "error", reason[:4000])
        store.set_terminated(tracking_id, "FAILED")
    except MlflowException as error:
        first = str(error).strip().splitlines()[0]
        print(f"warning: the tracking store did not note the failure: {first}", file=sys.stderr)


def tracking_id_of(run: RunFolder) -> str:
    """The MLflow run of a run folder."""
    return str(read_json(run.path / "tracking.json")["mlflow_run_id"])


def is_tracked(workspace: Workspace, run: RunFolder) -> bool:
    """Whether the workspace's store knows the MLflow run of a run folder."""
    from mlflow.exceptions import MlflowException

    if not (run.path / "tracking.json").is_file():
        return False
    try:
        client(workspace).get_run(tracking_id_of(run))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings and lists as dotted keys, the values as text of at most 5,000 characters."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return [(prefix, str(value)[:5000])]
    return [pair for key, inner in items for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
