"""The stages of a run, in order: prepare, plan, train, score, judge, report, track, register."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from cluster.aids import describe_aids, ready_aids, ready_data
from cluster.scoring import score_jobs
from cluster.screen import progress
from cluster.session import needs, ray_session
from training.attempts import Hands, room_for, train_to_the_end
from training.data.prepare import load_prepared, prepare
from training.errors import Problem, TenureError, fail, raise_all
from training.evaluation.presets import add_presets
from training.evaluation.scorecard import DataSummary, Scorecard, read_scorecard
from training.lineage import find_base, inherit_suites
from training.models import hash_folder, read_model_info
from training.objective.teacher import check_teacher
from training.plan import GIB, Plan, describe_replay, describe_tasks, make_plan
from training.protection.importance import check_importances
from training.spec import Evaluation, Export, RunSpec, Scaling
from training.specfile import load_spec
from training.strategy import Replay, is_adapter
from training.suite_spec import Harness
from training.workspace import RunFolder, Workspace, read_json, write_json

_SPARE_DISK_BYTES = 256 * 2**20


def read_spec(path: Path, workspace: Workspace) -> RunSpec:
    """The spec of a file: model found, data files seen, with the suites of its presets and of its base's lineage."""
    spec = load_spec(path, find_model=lambda name: find_base(name, workspace))
    return inherit_suites(add_presets(spec, workspace), workspace)


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


def start_run(
    spec_path: Path,
    spec: RunSpec,
    plan: Plan,
    workspace: Workspace,
    about: dict[str, Any] | None = None,
    run_id: str | None = None,
) -> RunFolder:
    """A new run folder with its spec (as given and as read), plan and lineage; none when it cannot be tracked.

    Args:
        about: what is noted in the lineage beside what the spec gives.
        run_id: the folder's name; by default the spec's with a number.
    """
    run = workspace.claim_run(run_id) if run_id else workspace.new_run(spec.name)
    shutil.copyfile(spec_path, run.spec_yaml)
    return begin_run(run, spec, plan, workspace, about)


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


def session(workspace: Workspace, address: str | None, scaling: Scaling) -> AbstractContextManager[None]:
    """Ray with what a run claims of it; opened before the run has a folder, so that a refusal leaves nothing."""
    return ray_session(address, needs(scaling), workspace.root / "ray.log")


def rescale(run: RunFolder, workspace: Workspace, workers: int | None, zero_stage: int | None) -> None:
    """Plan a started run anew for other workers or another ZeRO stage; its checkpoints fit any."""
    given = {"workers": workers, "zero_stage": zero_stage}
    changes = {key: value for key, value in given.items() if value is not None}
    if changes:
        raw = spec_of(run).model_dump(mode="json")
        try:
            spec = RunSpec.model_validate({**raw, "scaling": {**raw["scaling"], **changes}})
        except ValidationError as error:
            reason = error.errors()[0].get("ctx", {}).get("what") or error.errors()[0]["msg"]
            raise fail(str(reason), "--workers, --zero-stage", "give a scale that divides the global batch") from None
        plan, _ = plan_run(spec, workspace)
        write_json(run.spec, spec.model_dump(mode="json"))
        write_json(run.plan, asdict(plan))


def execute(run: RunFolder, workspace: Workspace, console: Console) -> Scorecard:
    """Do what is left of a run; its scorecard.

    Ray is connected by the caller, see session(). The driver's and the libraries' output goes to the run's log; a
    failed or interrupted run is closed in the tracking store.
    """
    from training.faults import output_to
    from training.tracking import fail_tracking, tracking_id_of

    if run.registration.is_file():
        console.print(f"run [bold]{run.id}[/] is finished")
        return read_scorecard(run.scorecard)
    console.print(f"run [bold]{run.id}[/]   logs {run.logs}")
    with run.held():
        try:
            with output_to(run.logs / "driver.log"):
                return _stages(run, workspace, console)
        except (TenureError, KeyboardInterrupt) as error:
            fail_tracking(workspace, tracking_id_of(run), str(error) or "interrupted")
            raise


def _stages(run: RunFolder, workspace: Workspace, console: Console) -> Scorecard:
    """Train unless the artifact stands, score, judge, report and register."""
    from serving.registry import register
    from training.reporting.report import write_report
    from training.tracking import finish_tracking, log_metrics, tracking_id_of

    spec, plan = spec_of(run), Plan(**read_json(run.plan))
    tracking_id = tracking_id_of(run)
    if not run.artifact.is_dir():
        _train(run, spec, plan, workspace, console)
    log_metrics(workspace, run, tracking_id)
    console.print("scoring base and tuned on every suite")
    scorecard = score_run(run, spec, workspace)
    write_report(run)
    registered = register(workspace, run, spec, scorecard)
    finish_tracking(workspace, run, tracking_id, scorecard)
    write_json(run.registration, asdict(registered))
    return scorecard


def _train(run: RunFolder, spec: RunSpec, plan: Plan, workspace: Workspace, console: Console) -> None:
    from training.fit import fit
    from training.worker import drop_torn_row, make_job

    def train(plan: Plan, scaling: Scaling) -> None:
        write_json(run.plan, asdict(plan))
        fit(make_job(spec, plan, prepared, run, hash_training(spec), aids), scaling, run)

    def replan(workers: int, micro: int | None) -> Plan:
        amended = _rescaled(spec, {"workers": workers}, {"micro_batch_size": micro} if micro else {})
        return plan_run(amended, workspace)[0]

    drop_torn_row(run.metrics)
    console.print("scoring the base")
    for line in check_power(run, spec, workspace):
        console.print(f"[yellow]weak suite[/] {escape(line)}")
    prepared = ready_data(spec, workspace, console)
    aids = ready_aids(spec, prepared, workspace, run.logs, memory_limit(spec.scaling))
    for line in describe_tasks(plan.tasks):
        console.print(line)
    if replay := spec.protection(Replay):
        console.print(f"replaying {describe_replay(plan, replay.share)}")
    note = describe_aids(spec, prepared, aids)
    if note:
        console.print(note)
    console.print(f"training on {plan.workers} workers, ZeRO {plan.zero_stage}, {plan.steps} steps")
    run.notice.unlink(missing_ok=True)
    with progress(console, run.metrics, plan.steps), asked_by_signal(run):
        hands = Hands(replan, train, room_for, lambda line: console.print(line, markup=False))
        train_to_the_end(run, spec, plan, hands)


def _rescaled(spec: RunSpec, scaling: dict[str, Any], training: dict[str, Any]) -> RunSpec:
    """A spec with other values in two sections, not looked at anew."""
    sections = {"scaling": (spec.scaling, scaling), "training": (spec.training, training)}
    return spec.model_copy(update={name: old.model_copy(update=new) for name, (old, new) in sections.items()})


@contextmanager
def asked_by_signal(run: RunFolder) -> Iterator[None]:
    """While workers train, SIGTERM asks them to write a checkpoint and leave; only a main thread can hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: run.notice.touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def score_run(run: RunFolder, spec: RunSpec, workspace: Workspace) -> Scorecard:
    """The scorecard of a run's artifact against its base, written into the run's folder."""
    scorecard = score_artifacts(run, spec, workspace, {"tuned": run.artifact})["tuned"]
    write_json(run.scorecard, scorecard.model_dump(mode="json"))
    return scorecard


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
