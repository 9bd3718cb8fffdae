"""What a run needs computed once before its training: each aid is cached by content and shared by all runs.

An aid is a file or folder that workers read; its name in the job says what it is.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from training.data.prepare import load_prepared, prepare
from training.objective.generate import replay_job, write_replay
from training.processes import alone_at, run_tasks, sharing
from training.protection.passes import ready_importances
from training.spec import RunSpec
from training.strategy import Replay
from training.workspace import Workspace, read_json


def ready_data(spec: RunSpec, workspace: Workspace, console: Console) -> Path:
    """Everything encoded, the rows that the base is to write for replay included. Ray is connected by the caller."""
    replay = spec.protection(Replay)
    if replay is None or replay.generate is None:
        return prepare(spec, workspace)
    job = replay_job(spec, workspace)
    rows = Path(job.target)
    if not rows.is_file():
        console.print(f"the base writes {replay.generate.examples} rows to replay")
        run_tasks(write_replay, [job], spec.scaling, Path(job.log), "the process that writes replay rows")
    counts = read_json(rows.with_suffix(".json"))["counts"]
    told = f"{counts['kept']} written by the base, {counts['cut']} of them cut, {counts['dropped']} empty ones dropped"
    console.print(f"rows to replay: {told}; see {rows}")
    return prepare(spec, workspace, rows)


def ready_aids(
    spec: RunSpec, prepared: Path, workspace: Workspace, logs: Path, memory_limit: int | None, per_gpu: int = 1
) -> dict[str, str]:
    """The paths of a run's aids by name, made where they are missing. Ray is connected by the caller.

    Args:
        logs: where the processes that make them write.
        memory_limit: bytes that one worker may take, or None where that is not known.
        per_gpu: how many of the processes share a GPU.

    Raises:
        TenureError: an aid cannot be made.
    """
    signals = ready_signals(spec, prepared, workspace, logs, per_gpu)
    return signals | ready_importances(spec, workspace, logs, memory_limit, per_gpu)


def ready_signals(spec: RunSpec, prepared: Path, workspace: Workspace, logs: Path, per_gpu: int = 1) -> dict[str, str]:
    """The files of what frozen models say about the training rows, computed where they are not there yet."""
    from training.evaluation.scoring import scoring_precision
    from training.objective.signals import compute_signals, signal_jobs

    jobs = signal_jobs(spec, prepared, workspace, scoring_precision(spec.scaling.gpus_per_worker), logs)
    with alone_at(Path(job.target) for job in jobs.values()):
        missing = [job for job in jobs.values() if not Path(job.target).is_file()]
        claimed = sharing(spec.scaling, per_gpu)
        run_tasks(compute_signals, missing, claimed, logs, "the process that asks a frozen model")
    return {name: job.target for name, job in jobs.items()}


def describe_aids(spec: RunSpec, prepared: Path, aids: dict[str, str]) -> str:
    """What the aids change about the run, in words; empty when there is nothing to tell.

    Raises:
        TenureError: they leave nothing to learn.
    """
    if not any(protection.type in ("flow", "stm") for protection in spec.protections):
        return ""
    from training.objective.weighing import describe, weigh

    data = load_prepared(prepared)
    return describe(data, weigh(data, spec, aids))
