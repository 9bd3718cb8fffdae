"""Work beside the training: Ray tasks that each run in a process of their own."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from training.errors import TenureError, fail
from training.spec import Scaling

# Of what is being made in this process.
_MADE: defaultdict[str, Lock] = defaultdict(Lock)


@contextmanager
def alone_at(targets: Iterable[Path]) -> Iterator[None]:
    """Nobody else in this process makes these files or folders meanwhile; who waited finds them made."""
    with ExitStack() as held:
        for target in sorted(map(str, targets)):
            held.enter_context(_MADE[target])
        yield


def sharing(scaling: Scaling, per_gpu: int) -> Scaling:
    """What a process claims where `per_gpu` of them share a GPU."""
    return scaling.model_copy(update={"gpus_per_worker": scaling.gpus_per_worker / per_gpu})


def run_tasks(compute: Callable[[Any], Any], jobs: Sequence[Any], scaling: Scaling, logs: Path, name: str) -> list[Any]:
    """Run jobs as Ray tasks, each in a fresh process of its own, sharing the processors; their results in order.

    Raises:
        TenureError: what a job raised, or its process died.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not jobs:
        return []
    task = ray.remote(
        num_cpus=cpus_each(len(jobs), scaling, machines()),
        num_gpus=scaling.gpus_per_worker,
        max_calls=1,
        max_retries=1,
        scheduling_strategy="SPREAD",  # also lets a trial of a sweep ask for more than its own process claims
    )(compute)
    try:
        return list(ray.get([task.remote(job) for job in jobs]))
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, TenureError) else error from None
    except RayError as error:
        what = f"{name} died: {str(error).strip().splitlines()[0]}"
        raise fail(what, str(logs), "free some memory, then: tenure resume RUN") from None


def claim_of(scaling: Scaling) -> dict[str, float]:
    """What a job that runs alone claims of the cluster."""
    claim = {"CPU": float(cpus_each(1, scaling, machines()))}
    return {**claim, "GPU": float(scaling.gpus_per_worker)} if scaling.gpus_per_worker else claim


def num_places(scaling: Scaling) -> int:
    """How many processes of their own the cluster has room for: its free GPUs or, without any, its machines."""
    import ray

    return int(ray.available_resources().get("GPU", 0)) if scaling.gpus_per_worker else len(machines())


def cpus_each(jobs: int, scaling: Scaling, lent: Sequence[int]) -> int:
    """CPUs for each of many jobs, so that those that share a machine share its processors.

    Args:
        lent: the CPUs of each machine.
    """
    if scaling.gpus_per_worker:
        return 1
    return max(1, min(lent) // math.ceil(jobs / len(lent)))


def machines() -> list[int]:
    """The CPUs of every machine that has any to lend; this one, alone, lends no more than it has."""
    import ray

    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    lending = [cpus for cpus in found if cpus]
    return lending if len(lending) > 1 else [min([os.cpu_count() or 1, *lending])]
