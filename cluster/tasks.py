"""Work beside the training: Ray tasks that each run in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.errors import TenureError, fail
from training.spec import Scaling


def run_tasks(compute: Callable[[Any], Any], jobs: Sequence[Any], scaling: Scaling, logs: Path, name: str) -> list[Any]:
    """Run jobs as Ray tasks, each in a fresh process of its own, sharing the processors; their results in order.

    Raises:
        TenureError: what a job raised, or its process died.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not jobs:
        return []
    cpus = min(os.cpu_count() or 1, int(ray.cluster_resources()["CPU"])) // len(jobs) or 1
    cpus = 1 if scaling.gpus_per_worker else cpus
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": scaling.gpus_per_worker, "max_calls": 1, "max_retries": 1}
    # Called from a trial of a sweep they would have to fit into what its own process claims.
    options["scheduling_strategy"] = "DEFAULT"
    task = ray.remote(**options)(compute)
    try:
        return list(ray.get([task.remote(job) for job in jobs]))
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, TenureError) else error from None
    except RayError as error:
        what = f"{name} died: {str(error).strip().splitlines()[0]}"
        raise fail(what, str(logs), "free some memory, then: tenure resume RUN") from None
