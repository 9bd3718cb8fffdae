"""The stages of a run, in order: prepare, plan, train, score, judge, report, track, register."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from cluster.screen import progress
from cluster.session import needs, ray_session
from training.aids import describe_aids, ready_aids, ready_data
from training.attempts import Hands, train_to_the_end
from training.errors import TenureError, fail
from training.evaluation.presets import add_presets
from training.evaluation.scorecard import Scorecard, read_scorecard
from training.job import drop_torn_row, make_job
from training.lineage import find_base, inherit_suites
from training.plan import Plan, describe_replay, describe_tasks
from training.processes import claim_of
from training.spec import RunSpec, Scaling
from training.specfile import load_spec
from training.stages import begin_run, check_power, hash_training, memory_limit, plan_run, score_artifacts, spec_of
from training.strategy import Replay
from training.waiting import room_for, waits_told, worker_resources
from training.workspace import RunFolder, Workspace, read_json, write_json

# What a run's beginning imports for seconds, and Ray's does not.
_NEEDED = ("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "torch")


def read_spec(path: Path, workspace: Workspace) -> RunSpec:
    """The spec of a file: model found, data files seen, with the suites of its presets and of its base's lineage."""
    spec = load_spec(path, find_model=lambda name: find_base(name, workspace))
    return inherit_suites(add_presets(spec, workspace), workspace)


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


def session(workspace: Workspace, address: str | None, scaling: Scaling) -> AbstractContextManager[None]:
    """Ray with what a run claims of it; opened before the run has a folder, so that a refusal leaves nothing."""
    return ray_session(address, needs(scaling), workspace.root / "ray.log", _NEEDED)


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
    from training.copies import copied
    from training.faults import output_to
    from training.tracking import fail_tracking, tracking_id_of

    store = spec_of(run).scaling.copy_to
    if run.registration.is_file():
        console.print(f"run [bold]{run.id}[/] is finished")
        with copied(run, store, teller(console)):
            return read_scorecard(run.scorecard)
    console.print(f"run [bold]{run.id}[/]   logs {run.logs}")
    with run.held(), copied(run, store, teller(console)):
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
    with waits_told(claim_of(spec.scaling), 1, teller(console)):
        scorecard = score_run(run, spec, workspace)
    write_report(run)
    registered = register(workspace, run, spec, scorecard)
    finish_tracking(workspace, run, tracking_id, scorecard)
    write_json(run.registration, asdict(registered))
    return scorecard


def _train(run: RunFolder, spec: RunSpec, plan: Plan, workspace: Workspace, console: Console) -> None:
    from training.fit import fit, free_groups

    def train(plan: Plan, scaling: Scaling) -> None:
        write_json(run.plan, asdict(plan))
        free_groups()
        with waits_told(worker_resources(scaling), scaling.workers, tell):
            fit(make_job(spec, plan, prepared, run, hash_training(spec), aids), scaling, run)

    def replan(workers: int, micro: int | None) -> Plan:
        amended = _rescaled(spec, {"workers": workers}, {"micro_batch_size": micro} if micro else {})
        return plan_run(amended, workspace)[0]

    tell = teller(console)
    drop_torn_row(run.metrics)
    console.print("scoring the base")
    with waits_told(claim_of(spec.scaling), 1, tell):
        weak = check_power(run, spec, workspace)
    for line in weak:
        console.print(f"[yellow]weak suite[/] {escape(line)}")
    with waits_told(claim_of(spec.scaling), 1, tell):
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
        hands = Hands(replan, train, room_for, tell)
        train_to_the_end(run, spec, plan, hands)


def teller(console: Console) -> Callable[[str], None]:
    """Tells whole lines: who looks for one in a job's log finds it unbroken."""
    return lambda line: console.print(line, markup=False, soft_wrap=True)


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
