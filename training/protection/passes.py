"""Passes of the base over a protection's own data, for the importance of its weights: once for all runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.data.prepare import load_prepared, prepare
from training.errors import raise_all
from training.models import hash_file, hash_folder, read_model_info
from training.plan import Plan, make_plan
from training.processes import alone_at, sharing
from training.protection.importance import TENSORS_FILE, VERSION, read_info, unbearable
from training.section import Source
from training.spec import Data, Export, RunSpec, Scaling, TrainSource
from training.strategy import Ewc, Full, Lm, Sft, Si
from training.workspace import Workspace

_AGAIN = "run the command again"


def ready_importances(
    spec: RunSpec, workspace: Workspace, logs: Path, memory_limit: int | None, per_gpu: int = 1
) -> dict[str, str]:
    """The folder of each protection's importance by the protection's type, computed where it is not there yet.

    Ray is connected by the caller; `per_gpu` of the passes' workers share a GPU.

    Raises:
        TenureError: a strength is more than the steps can bear.
    """
    found: dict[str, str] = {}
    for protection in spec.protections:
        if isinstance(protection, Ewc | Si):
            folder = protection.importance or _computed(protection, spec, workspace, logs, memory_limit, per_gpu)
            if folder is not None:
                raise_all(unbearable(protection, read_info(folder), spec))
                found[protection.type] = str(folder)
    return found


def _computed(
    protection: Ewc | Si, spec: RunSpec, workspace: Workspace, logs: Path, memory_limit: int | None, per_gpu: int
) -> Path | None:
    """The cached importance on a protection's own data; None where it has none."""
    if not protection.data:
        return None
    looked_at = _spec_of_pass(protection, spec)
    prepared = prepare(looked_at, workspace)
    target = _cached(protection, looked_at, prepared, workspace)
    with alone_at([target]):
        if not target.is_dir():
            counts = load_prepared(prepared).counts()
            plan = make_plan(looked_at, read_model_info(Path(spec.model)), counts, memory_limit)
            target.parent.mkdir(parents=True, exist_ok=True)
            claimed = sharing(spec.scaling, per_gpu)
            if isinstance(protection, Ewc):
                _fisher(protection, looked_at, plan, prepared, target, logs, claimed)
            else:
                _consolidate(looked_at, plan, prepared, target, logs, claimed)
    return target


def importance_of_run(protection: Ewc | Si, spec: RunSpec, workspace: Workspace) -> Path | None:
    """The folder of the importance that a finished run's protection used; None where it had none."""
    if protection.importance or not protection.data:
        return protection.importance
    looked_at = _spec_of_pass(protection, spec)
    return _cached(protection, looked_at, prepare(looked_at, workspace), workspace)


def _cached(protection: Ewc | Si, looked_at: RunSpec, prepared: Path, workspace: Workspace) -> Path:
    """Where the importance on a protection's own data lies, or will lie."""
    return workspace.cache / "importance" / _key(protection, looked_at, prepared)


def _spec_of_pass(protection: Ewc | Si, spec: RunSpec) -> RunSpec:
    """The spec with the protection's data in place of the training data, and whole weights that move."""
    training: dict[str, Any] = {"validation_items": 0, "validate_every_steps": 0, "checkpoint_every_steps": 0}
    own: tuple[Si, ...] = ()
    if isinstance(protection, Si):
        training |= {"max_steps": protection.steps, "epochs": protection.steps, "weight_decay": 0.0}
        training |= {"learning_rate": protection.learning_rate, "schedule": "constant", "warmup_ratio": 0.0}
        own = (Si(strength=protection.strength, xi=protection.xi, record=True),)
    return spec.model_copy(
        update={
            "objective": _objective(protection.data),
            "tuning": Full(),
            "protections": own,
            "data": Data(train=tuple(map(TrainSource.of, protection.data)), overlong=spec.data.overlong),
            "training": spec.training.model_copy(update=training),
            "export": Export(),
        }
    )


def _objective(sources: tuple[Source, ...]) -> Sft | Lm:
    return Lm() if all(source.form == "text" for source in sources) else Sft()


def _key(protection: Ewc | Si, looked_at: RunSpec, prepared: Path) -> str:
    """A hash of all that decides the importance."""
    parts = {
        "version": VERSION,
        "base": hash_folder(Path(looked_at.model)),
        "data": prepared.stem,
        "training": looked_at.training.model_dump(mode="json") if isinstance(protection, Si) else None,
        "precision": looked_at.training.precision,
        "seed": looked_at.training.seed,
    }
    if isinstance(protection, Ewc):
        parts |= {"estimator": protection.estimator, "examples": protection.examples, "gamma": protection.gamma}
        parts["previous"] = protection.previous and hash_file(protection.previous / TENSORS_FILE)
    else:
        parts["xi"] = protection.xi
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _fisher(
    protection: Ewc, looked_at: RunSpec, plan: Plan, prepared: Path, target: Path, logs: Path, claimed: Scaling
) -> None:
    from training.fit import run_workers
    from training.protection.fisher import FisherJob, fisher_worker

    job = FisherJob(
        base=looked_at.model,
        prepared=str(prepared),
        target=str(target),
        logs=str(logs),
        precision=looked_at.training.precision,
        zero_stage=plan.zero_stage,
        estimator=protection.estimator,
        examples=protection.examples,
        seed=looked_at.training.seed,
        previous=str(protection.previous) if protection.previous else None,
        gamma=protection.gamma,
        about={"base_hash": hash_folder(Path(looked_at.model)), "data_hash": prepared.stem},
    )
    run_workers(fisher_worker, asdict(job), claimed, target.parent / "ray", target.name, logs, _AGAIN)


def _consolidate(looked_at: RunSpec, plan: Plan, prepared: Path, target: Path, logs: Path, claimed: Scaling) -> None:
    from training.fit import run_workers
    from training.job import make_job
    from training.protection.consolidate import consolidate_worker
    from training.workspace import RunFolder

    scratch = RunFolder(target.with_name(f".{target.name}.walk"))
    shutil.rmtree(scratch.path, ignore_errors=True)
    scratch.path.mkdir(parents=True)
    job = make_job(looked_at, plan, prepared, scratch, target.name, {})
    config = {"job": job, "target": str(target), "logs": str(logs)}
    run_workers(consolidate_worker, config, claimed, target.parent / "ray", target.name, logs, _AGAIN)
    shutil.rmtree(scratch.path)
