"""The consolidation pass of synaptic intelligence: a pre-trained base has no recorded path, so one is walked.

The base is trained for a few steps on retention data, its path is recorded, and the weights it led to are thrown away:
the importance is that of the base's own weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from training.faults import explained_at, output_to
from training.job import Job
from training.worker import Trainer
from training.workspace import RunFolder


def consolidate_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train: `job` as for train_worker, with a run folder to throw away; `target`; `logs`."""
    job, target, logs = Job(**config["job"]), Path(config["target"]), Path(config["logs"])
    with output_to(logs / f"importance-{dist.get_rank()}.log"), explained_at(logs):
        trainer = Trainer.start(job, RunFolder(Path(job.run)))
        while trainer.step < trainer.plan.steps:
            trainer.train_step()
        write = trainer.importance_writer()
        if dist.get_rank() == 0:
            write(target, Path(trainer.spec.model))
        dist.barrier()
        trainer.engine.destroy()
