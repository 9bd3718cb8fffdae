"""Tells when a run waits for other runs, or for nodes, to give it room on a cluster.

What a run wants is asked of Ray first, since clusters that grow by themselves grow for what is asked for; Ray tells
what of that it could not place yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from training.spec import Scaling

WAITING = "waiting for room on the cluster"
_LOOK_EVERY_S = 2.0
_LOOKS = 2  # in a row, since Ray places nothing at once


def worker_resources(scaling: Scaling) -> dict[str, float]:
    """What one worker claims of the cluster."""
    resources = {"CPU": float(scaling.cpus_per_worker)}
    return {**resources, "GPU": float(scaling.gpus_per_worker)} if scaling.gpus_per_worker else resources


def room_for(scaling: Scaling) -> int:
    """Workers that the cluster has free processors and GPUs for, whole workers on whole nodes."""
    return room_of(worker_resources(scaling))


def room_of(wants: dict[str, float]) -> int:
    """Processes that claim so much each which the cluster has room for now."""
    import ray

    alive: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = sum(min(int(have.get(name, 0) // amount) for name, amount in wants.items()) for have in alive)
    free = ray.available_resources()
    return max(0, min(nodes, *(int(free.get(name, 0) // amount) for name, amount in wants.items())))


def is_pending(wants: dict[str, float]) -> bool:
    """Whether Ray has not placed yet a group of this job's processes, or a task that claims so much.

    Tasks do not say whose they are; another job's of the same claim waits for the same. Never of a Ray client
    (ray://), which does not reach what tells it.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    if ray.util.client.ray.is_connected():
        return False
    context = ray.get_runtime_context()
    demands = get_cluster_status(context.gcs_address).resource_demands
    groups = any(group.pg_id.endswith(context.get_job_id()) for group in demands.placement_group_demand)
    return groups or any(
        asked.bundle == wants for demand in demands.ray_task_actor_demand for asked in demand.bundles_by_count
    )


@contextmanager
def waits_told(
    wants: dict[str, float],
    count: int,
    tell: Callable[[str], None],
    pending: Callable[[dict[str, float]], bool] = is_pending,
    room: Callable[[dict[str, float]], int] = room_of,
    every_s: float = _LOOK_EVERY_S,
) -> Iterator[None]:
    """While the body waits for `count` processes that Ray cannot place, say so; and when it has placed them."""
    ended = threading.Event()
    looks = threading.Thread(target=_look, args=(ended, wants, count, tell, pending, room, every_s), daemon=True)
    looks.start()
    try:
        yield
    finally:
        ended.set()
        looks.join()


def _look(
    ended: threading.Event,
    wants: dict[str, float],
    count: int,
    tell: Callable[[str], None],
    pending: Callable[[dict[str, float]], bool],
    room: Callable[[dict[str, float]], int],
    every_s: float,
) -> None:
    waits = 0
    while not ended.wait(every_s):
        if pending(wants):
            waits += 1
            if waits == _LOOKS:
                tell(f"{WAITING}: {_told(wants, count)} wanted, room for {room(wants)}")
        else:
            if waits >= _LOOKS:
                tell("there is room now")
            waits = 0


def wait_in(said: str) -> str:
    """What a run waits for, by all that it has said; nothing where that is not the last of it."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines and lines[-1].startswith(WAITING) else ""


def _told(wants: dict[str, float], count: int) -> str:
    each = " and ".join(f"{amount:g} {name}" for name, amount in wants.items())
    return f"{count} process{'es' * (count > 1)} of {each}"
