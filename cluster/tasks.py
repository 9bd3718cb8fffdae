"""Work beside training as Ray tasks, each in a fresh process that takes its memory with it when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from training.errors import TenureError, fail
from training.spec import Scaling

Job = TypeVar("Job")
_AT_ONCE = 2


def run_tasks(function: Callable[[Job], float], jobs: Sequence[Job], scaling: Scaling, kind: str, log: str) -> float:
    """Run a function on every job, two at once on processors and one on every GPU that a run has; the seconds in all.

    Args:
        kind: what died, should a process die ("scoring").
        log: the folder or file where its words are.

    Raises:
        TenureError: what a task raised, or its process died.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not jobs:
        return 0.0
    at_once = min(len(jobs), _AT_ONCE)
    cpus = max(1, (os.cpu_count() or 1) // at_once) if not scaling.gpus_per_worker else 1
    cpus = min(cpus, int(ray.cluster_resources()["CPU"]) // at_once or 1)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": scaling.gpus_per_worker, "max_calls": 1, "max_retries": 1}
    task = ray.remote(**options)(function)
    try:
        return float(sum(ray.get([task.remote(job) for job in jobs])))
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, TenureError) else error from None
    except RayError as error:
        what = f"a {kind} process died: {str(error).strip().splitlines()[0]}"
        raise fail(what, log, "free some memory, then: tenure resume RUN") from None
