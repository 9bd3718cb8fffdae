"""What a run and a trial of a sweep have in common: data checked and planned, a folder begun, artifacts scored."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.data.prepare import load_prepared, prepare
from training.errors import Problem, TenureError, fail, raise_all
from training.evaluation.scorecard import DataSummary, Scorecard
from training.evaluation.spread import score_jobs
from training.models import hash_folder, read_model_info
from training.objective.teacher import check_teacher
from training.plan import GIB, Plan, make_plan
from training.protection.importance import check_importances
from training.spec import Evaluation, Export, RunSpec, Scaling
from training.strategy import is_adapter
from training.suite_spec import Harness
from training.workspace import RunFolder, Workspace, read_json, write_json

_SPARE_DISK_BYTES = 256 * 2**20


def plan_run(spec: RunSpec, workspace: Workspace) -> tuple[Plan, Path]:
    """Check and encode all data, and plan; nothing of a run exists yet."""
    check_importances(spec)
    check_tasks(spec)
    teacher = check_teacher(spec)
    prepared = prepare(spec, workspace)
    counts = load_prepared(prepared).counts()
    plan = make_plan(spec, read_model_info(Path(spec.model)), counts, memory_limit(spec.scaling), teacher)
    check_disk(workspace, plan.disk_bytes, "the run")
    return plan, prepared


def check_tasks(spec: RunSpec) -> None:
    """Load the tasks of lm-evaluation-harness that are suites, with their data; refuse all that cannot be, at once."""
    from training.evaluation.harness_tasks import load_tasks

    problems: list[Problem] = []
    for suite in spec.suites.every:
        if isinstance(suite, Harness):
            try:
                load_tasks(suite)
            except TenureError as error:
                problems += error.problems
    raise_all(problems)


def memory_limit(scaling: Scaling) -> int | None:
    """Bytes of this machine's memory that one worker may take; None on GPUs, whose memory the workers know."""
    import psutil

    return None if scaling.gpus_per_worker else int(psutil.virtual_memory().available / scaling.workers)


def check_disk(workspace: Workspace, disk_bytes: int, what_needs: str) -> None:
    """Refuse what would leave more on disk (checkpoints and artifacts) than there is room for."""
    workspace.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(workspace.root).free
    need = disk_bytes + _SPARE_DISK_BYTES
    if need > free:
        what = f"{what_needs} needs {need / GIB:.1f} GiB of disk and {free / GIB:.1f} GiB are free"
        raise fail(what, str(workspace.root), "free some space, or put --workspace on a larger disk")


def begin_run(
    run: RunFolder,
    spec: RunSpec,
    plan: Plan,
    workspace: Workspace,
    about: dict[str, Any] | None = None,
    parent: str | None = None,
) -> RunFolder:
    """Write spec, plan and lineage into a new run's folder and track it; the folder goes when it cannot be tracked.

    Args:
        about: as for start_run().
        parent: the MLflow run that this one is a child of.
    """
    from training.tracking import collect_lineage, start_tracking

    lineage = {**collect_lineage(spec, hash_spec(spec)), **(about or {})}
    write_json(run.spec, spec.model_dump(mode="json"))
    write_json(run.plan, asdict(plan))
    write_json(run.lineage, lineage)
    try:
        start_tracking(workspace, run, spec, plan, lineage, parent)
    except TenureError:
        shutil.rmtree(run.path)
        raise
    return run


def spec_of(run: RunFolder) -> RunSpec:
    """The spec that a run was started with, as it was read then.

    Raises:
        TenureError: the folder holds none.
    """
    if not run.spec.is_file():
        raise fail(f"run '{run.id}' never started: it has no {run.spec.name}", str(run.path), "train its spec again")
    return RunSpec.model_validate(read_json(run.spec))


def hash_spec(spec: RunSpec) -> str:
    """A hash of all that the spec says."""
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def hash_training(spec: RunSpec) -> str:
    """A hash of what decides a run's weights: all that the spec says but where it runs, and what comes after."""
    return hash_spec(spec.model_copy(update={"scaling": Scaling(), "export": Export(), "evaluation": Evaluation()}))


def score_artifacts(
    run: RunFolder, spec: RunSpec, workspace: Workspace, artifacts: dict[str, Path]
) -> dict[str, Scorecard]:
    """Scorecards by name, each of an artifact against the base; whatever was scored before comes from the cache.

    Every model is scored in a process of its own, whose log is named after it.
    """
    from training.evaluation import scoring
    from training.evaluation.judge import build_scorecard

    base = Path(spec.model)
    protocol, key = protocol_key(spec)
    targets, seconds = _score_models(run, spec, workspace, key, {"base": base, **artifacts})
    return {
        name: build_scorecard(
            run_id=run.id,
            spec=spec,
            artifact_hash=hash_folder(artifact),
            protocol=protocol,
            protocol_hash=key,
            base=scoring.read_scores(targets["base"]),
            tuned=scoring.read_scores(targets[name]),
            seconds=seconds,
            data=_data_summary(run),
            kl=scoring.read_kl(targets[name]),
        )
        for name, artifact in artifacts.items()
    }


def _data_summary(run: RunFolder) -> DataSummary | None:
    """What the run was trained on, by its plan; None for what is scored without one."""
    if not run.plan.is_file():
        return None
    plan = Plan(**read_json(run.plan))
    return DataSummary(**{name: getattr(plan, name) for name in DataSummary.model_fields})


def protocol_key(spec: RunSpec) -> tuple[dict[str, str | int | float | bool | None], str]:
    """What decides a score beside the model, and its hash."""
    from training.evaluation import scoring

    protocol = scoring.protocol_of(spec, scoring.scoring_precision(spec.scaling.gpus_per_worker))
    return protocol, scoring.protocol_hash(protocol, Path(spec.model))


def _score_models(
    run: RunFolder, spec: RunSpec, workspace: Workspace, key: str, models: dict[str, Path]
) -> tuple[dict[str, Path], float]:
    """Where the models' scores lie by name, and the seconds it took to score those that were not in the cache.

    A base that was never scored comes first, for its distributions are what the others are compared with.
    """
    from training.evaluation import scoring

    base = Path(spec.model)
    of_base = f"{key}/{hash_folder(base)}"  # an adapter's own hash does not say which base it is on
    targets = {
        name: scoring.cached_scores(workspace, model, key if model == base else of_base)
        for name, model in models.items()
    }
    base_scores = scoring.cached_scores(workspace, base, key)
    jobs = {
        target: scoring.ScoreJob(
            spec=spec.model_dump(mode="json"),
            base=str(base),
            artifact=None if models[name] == base else str(models[name]),
            is_adapter=is_adapter(spec.tuning) and models[name] != base,
            target=str(target),
            log=str(run.logs / f"score-{name}.log"),
            base_scores=str(base_scores),
        )
        for name, target in targets.items()
        if not scoring.is_scored(target, is_base=models[name] == base)
    }
    waves = [[job for job in jobs.values() if (job.artifact is None) is is_base] for is_base in (True, False)]
    seconds = 0.0
    for wave in waves:
        seconds += score_jobs(wave, spec, run.logs)
    return targets, seconds


def check_power(run: RunFolder, spec: RunSpec, workspace: Workspace) -> list[str]:
    """Score the base, unless that is cached, and tell which suites cannot show what the contract asks of them."""
    from training.evaluation import scoring
    from training.evaluation.power import powers, warnings

    targets, _ = _score_models(run, spec, workspace, protocol_key(spec)[1], {"base": Path(spec.model)})
    return list(warnings(powers(spec, scoring.read_scores(targets["base"])[0])))


def known_power(spec: RunSpec, workspace: Workspace) -> list[str] | None:
    """What check_power tells, from the cache alone; None where the base was not scored yet."""
    from training.evaluation import scoring
    from training.evaluation.power import powers, warnings

    cached = scoring.cached_scores(workspace, Path(spec.model), protocol_key(spec)[1])
    return (
        list(warnings(powers(spec, scoring.read_scores(cached)[0])))
        if scoring.is_scored(cached, is_base=True)
        else None
    )
