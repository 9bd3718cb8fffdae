"""Whole training jobs without the command line: many in one group of Ray Train workers, or one in this process."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from tiny_spec import write_rows, write_tiny_spec

from cluster.pipeline import read_spec
from training.errors import TenureError
from training.faults import output_to
from training.job import Job, make_job
from training.objective.signals import compute_signals, signal_jobs
from training.plan import Plan
from training.spec import RunSpec
from training.stages import hash_training, plan_run
from training.worker import Trainer
from training.workspace import RunFolder, Workspace, read_json, write_json

JobValues = dict[str, Any]
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "full": {"type": "full"},
    "l2sp": {"type": "full"},
}
PROTECTIONS = {"l2sp": [{"type": "l2sp", "strength": 0.1, "update": "coupled"}]}
# 45 rows in batches of 8: the sixth step of every epoch is short. The loss of a random model starts near 8 nats with
# gradients far above the clipping norm.
STEPS: dict[str, Any] = {
    "epochs": 4,
    "max_steps": 20,
    "micro_batch_size": 2,
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
    "validate_every_steps": 0,
    "checkpoint_every_steps": 0,
}
# Steps enough that a worker can be killed on the way.
LONG = STEPS | {"epochs": 10, "max_steps": 60, "checkpoint_every_steps": 1, "validate_every_steps": 20}
TWO_WORKERS: dict[str, Any] = {"workers": 2, "zero_stage": 2}


def uneven_rows(count: int) -> list[dict[str, str]]:
    """Sums of one to six terms, so that questions have from 9 to 19 characters and answers one or two.

    `wrong` is another answer, of one to three characters, and `text` repeats question and answer, in 12 to 170.
    """
    terms = [[(index * 7 + place * 3) % 10 for place in range(1 + index % 6)] for index in range(count)]
    rows = [{"question": f"what is {'+'.join(map(str, row))}", "answer": str(sum(row))} for row in terms]
    return [
        row
        | {"wrong": str(int(row["answer"]) * (2 + index % 3) + 1)}
        | {"text": "; ".join([f"{row['question']} {row['answer']}"] * (1 + index % 7))}
        for index, row in enumerate(rows)
    ]


def write_spec(folder: Path, model: Path, rows: int = 45, amend: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A tiny spec over rows of uneven length; `amend` adds sections that the tiny spec leaves at their defaults."""
    path = write_tiny_spec(folder, model, rows=rows, **sections)
    write_rows(folder / "train.jsonl", uneven_rows(rows))
    spec = {**yaml.safe_load(path.read_text(encoding="utf-8")), **(amend or {})}
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


def start_job(folder: Path, model: Path, *, workers: int = 1, zero: int = 0, **other: Any) -> JobValues:
    """A planned job in a workspace of its own under `folder`; the rest as for write_spec."""
    path = write_spec(folder, model, scaling={"workers": workers, "zero_stage": zero}, **other)
    return plan_job(path, Workspace.at(folder / "workspace"))


def plan_job(path: Path, workspace: Workspace) -> JobValues:
    """The job of a spec file, with a run folder of its own."""
    spec = read_spec(path, workspace)
    plan, prepared = plan_run(spec, workspace)
    aids = aids_of(spec, prepared, workspace)
    return make_job(spec, plan, prepared, workspace.new_run(spec.name), hash_training(spec), aids)


def aids_of(spec: RunSpec, prepared: Path, workspace: Workspace) -> dict[str, str]:
    """A run's aids, made in this process where they are missing."""
    jobs = signal_jobs(spec, prepared, workspace, "float32", workspace.root)
    for job in jobs.values():
        if not Path(job.target).is_file():
            compute_signals(job)
    return {name: job.target for name, job in jobs.items()}


def run_of(job: JobValues) -> RunFolder:
    """The run folder of a job."""
    return RunFolder(Path(job["run"]))


def spec_of(job: JobValues) -> RunSpec:
    """The spec of a job."""
    return RunSpec.model_validate(job["spec"])


def plan_of(job: JobValues) -> Plan:
    """The plan of a job."""
    return Plan(**job["plan"])


def losses(job: JobValues) -> list[float]:
    """The loss of every step, in order."""
    return [row["loss"] for row in rows_of(run_of(job)) if row["kind"] == "step"]


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    """All whole rows of a run's metrics."""
    text = run.metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def weights(job: JobValues) -> dict[str, torch.Tensor]:
    """The tensors of a job's artifact."""
    return artifact_weights(run_of(job).artifact)


def artifact_weights(artifact: Path) -> dict[str, torch.Tensor]:
    """The tensors of an artifact, adapter or whole model."""
    (file,) = artifact.glob("*.safetensors")
    return load_file(file)


def train_here(job: JobValues) -> Trainer:
    """Run a job of one worker in this process; `single_process()` must be open."""
    trainer = Trainer.start(Job(**job), run_of(job))
    trainer.run()
    return trainer


@contextmanager
def single_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone, as Ray Train would have made it."""
    before = dict(os.environ)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    torch.set_num_threads(1)  # as in a worker of one CPU
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


After = Callable[[Trainer, RunFolder], None]


def train_in_group(jobs: list[JobValues], workers: int, storage: Path, after: After | None = None) -> None:
    """Run jobs one after another in one group of Ray Train workers. A job's faults land in its folder.

    `after` is called in every worker when a job is done, while its engine stands.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        _train_all,
        train_loop_config={"jobs": jobs, "after": after},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1.0}),
        run_config=RunConfig(name="group", storage_path=str(storage)),
    ).fit()


def _train_all(config: dict[str, Any]) -> None:
    for job in config["jobs"]:
        folder = RunFolder(Path(job["run"]))
        with output_to(folder.logs / f"worker-{dist.get_rank()}.log"):
            _train_one(job, folder, config["after"])
        gc.collect()


def _train_one(job: JobValues, folder: RunFolder, after: After | None) -> None:
    """A job that refuses to start leaves its reason in refusal-RANK.json."""
    rank = dist.get_rank()
    try:
        trainer = Trainer.start(Job(**job), folder)
    except TenureError as error:
        write_json(folder.path / f"refusal-{rank}.json", str(error))
        return
    trainer.run()
    dtypes = [str(master.dtype) for master in trainer.attached.layout.masters]
    buffers = sorted({str(buffer.dtype) for _, buffer in trainer.engine.module.named_buffers()})
    write_json(folder.path / f"dtypes-{rank}.json", {"masters": dtypes, "buffers": buffers})
    if after:
        after(trainer, folder)
    trainer.engine.destroy()


def dtypes_of(job: JobValues, rank: int) -> dict[str, list[str]]:
    """The dtypes of a worker's masters and buffers at the end of a job of a group."""
    found: dict[str, list[str]] = read_json(run_of(job).path / f"dtypes-{rank}.json")
    return found
