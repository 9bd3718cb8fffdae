"""A sweep in MLflow: one parent run with what it came to, and a child for every trial."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.pareto import REFERENCE, best_full, hypervolume, on_validation, pareto_front, place_of
from sweeps.result import Measured, Point, SweepResult, Trial
from sweeps.words import winning
from training.mlflow_store import client
from training.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MOST_TEXT = 4000


def log_trial(workspace: Workspace, tracking_id: str, trial: Trial, points: Iterable[Point] = ()) -> None:
    """Log a trial's rungs and points to its own run (a child of the sweep's), and close that.

    Metrics of rungs have the rung as their step; those of WiSE-FT points alpha in thousandths.

    Args:
        tracking_id: the trial's MLflow run.
    """
    from mlflow.entities import Metric

    store, now = client(workspace), int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, value, step in _trial_metrics(trial, points)]
    tags = {"strategy": trial.strategy, "trial_state": trial.state, "seed": str(trial.seed)}
    tags |= {"cause": trial.cause[:_MOST_TEXT]} if trial.cause else {}
    tags |= {f"setting.{path}": str(value)[:_MOST_TEXT] for path, value in trial.config.items()}
    for start in range(0, len(metrics), 500):
        store.log_batch(tracking_id, metrics=metrics[start : start + 500])
    _set_tags(store, tracking_id, tags)
    store.set_terminated(tracking_id, _STATUS[trial.state])


def _trial_metrics(trial: Trial, points: Iterable[Point]) -> Iterator[tuple[str, float, int]]:
    for seen in trial.curve:
        for name in ("gain", "retention", "kl_to_base", "loss", "tokens"):
            value = getattr(seen, name)
            if value is not None:
                yield f"rung/{name}", float(value), seen.rung
    for point in points:
        prefix = "wise" if point.alpha is not None else "final"
        step = round(1000 * point.alpha) if point.alpha is not None else point.rung
        yield f"{prefix}/gain", point.gain.value, step
        yield f"{prefix}/retention", point.retention.value, step
        yield f"{prefix}/retention_mean", point.retention_mean.value, step
    yield "gpu_hours", trial.gpu_hours, 0
    yield "seconds", trial.seconds, 0


def log_sweep(workspace: Workspace, tracking_id: str, result: SweepResult, files: Iterable[Path] = ()) -> None:
    """Log what a sweep came to to its own run, with its front as front.json and the files given; close it when done.

    Args:
        tracking_id: the sweep's MLflow run, the parent of its trials'.
        files: the result, the report and the winner's spec, those that exist.
    """
    store = client(workspace)
    front = pareto_front(on_validation(result.points))
    store.log_dict(tracking_id, {"front": [point.model_dump(mode="json") for point in front]}, "front.json")
    for name, value in _sweep_metrics(result, front):
        store.log_metric(tracking_id, name, value)
    _set_tags(store, tracking_id, _winner_tags(result))
    for file in files:
        if file.is_file():
            store.log_artifact(tracking_id, str(file))
    if result.finished is not None:
        store.set_terminated(tracking_id, "FINISHED")


def _sweep_metrics(result: SweepResult, front: list[Point]) -> Iterator[tuple[str, float]]:
    yield "hypervolume", hypervolume(map(place_of, front), REFERENCE)
    yield "front_points", float(len(front))
    for state in ("finished", "stopped", "failed"):
        yield f"trials_{state}", float(sum(trial.state == state for trial in result.searched))
    yield "gpu_hours", result.spent.gpu_hours or 0.0
    yield "tokens", float(result.spent.tokens or 0)
    winner, full = winning(result), best_full(result)
    if winner:
        yield from _measured("winner/validation/gain", winner.gain)
        yield from _measured("winner/validation/retention", winner.retention)
        if full and full.gain.value > 0:
            yield "winner/validation/share_of_full", winner.gain.value / full.gain.value
    if result.winner and result.winner.test:
        yield from _measured("winner/test/gain", result.winner.test.gain)
        yield from _measured("winner/test/retention", result.winner.test.retention)


def _measured(name: str, figure: Measured) -> Iterator[tuple[str, float]]:
    yield name, figure.value
    yield f"{name}/low", figure.low
    yield f"{name}/high", figure.high


def _winner_tags(result: SweepResult) -> dict[str, str]:
    winner = result.winner
    if winner is None:
        return {"winner": "none"} if result.finished else {}
    scored = winning(result)
    return {
        "winner": winner.trial,
        "winner.strategy": winner.strategy,
        "winner.alpha": "" if winner.alpha is None else f"{winner.alpha:g}",
        "winner.run": winner.run or "",
        "winner.reason": winner.reason[:_MOST_TEXT],
        "contract": scored.contract if scored else "",
    }


def _set_tags(store: MlflowClient, tracking_id: str, tags: dict[str, str]) -> None:
    for name, value in tags.items():
        store.set_tag(tracking_id, name, value)
