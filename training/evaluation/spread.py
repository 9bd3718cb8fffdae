"""Scoring over the cluster: every model in a process of its own, one model's suites in several where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.evaluation.parts import join_parts, split_job
from training.evaluation.scoring import ScoreJob, score_model
from training.processes import num_places, run_tasks
from training.spec import RunSpec


def score_jobs(jobs: Sequence[ScoreJob], spec: RunSpec, logs: Path) -> float:
    """Score models side by side as far as the cluster's GPUs (or, without any, its machines) reach; seconds in all.

    Raises:
        TenureError: a model cannot be scored, or a process died.
    """
    if not jobs:
        return 0.0
    room = num_places(spec.scaling) // len(jobs)
    parts = {job.target: split_job(job, spec, room) for job in jobs}
    missing = [part for job in jobs for part in parts[job.target] if not Path(part.target).is_file() or part == job]
    run_tasks(score_model, missing, spec.scaling, logs, "a scoring process")
    return sum(join_parts(job, spec, parts[job.target]) for job in jobs)
