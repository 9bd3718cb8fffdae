"""Hands a job to Ray Train and brings its faults back as one error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.errors import Left, OutOfMemory, Problem, TenureError, WorkerLost, fail
from training.spec import Scaling
from training.waiting import worker_resources
from training.workspace import RunFolder

# Ray Train looks after its workers every two seconds, and starts a process that tells workers of planned preemptions,
# which these workers, who write checkpoints of their own, would not hear.
_RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def fit(job: dict[str, Any], scaling: Scaling, folder: RunFolder) -> None:
    """Train on the Ray cluster that this process is connected to, once, until the artifact stands.

    Raises:
        WorkerLost, OutOfMemory, StorageFault, Left: as their names say.
        TenureError: another fault of a worker that the user can mend.
    """
    run_workers(train_worker, job, scaling, folder.path / "ray", folder.id, folder.logs, f"tenure resume {folder.id}")
    if not folder.artifact.is_dir() and folder.notice.exists():
        again = f"go on with: tenure resume {folder.id}"
        raise Left(Problem("the run was asked to leave, wrote a checkpoint and left", str(folder.notice), again))
    if not folder.artifact.is_dir():
        raise fail("training ended without an artifact", str(folder.logs), f"tenure resume {folder.id}")


def train_worker(config: dict[str, Any]) -> None:
    """What every worker runs; here, so that neither this process nor Ray Train's controller imports what it imports."""
    from training import worker

    worker.train_worker(config)


def run_workers(
    function: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    scaling: Scaling,
    storage: Path,
    name: str,
    logs: Path,
    again: str,
) -> None:
    """Run a function on a group of Ray Train workers with a process group between them.

    Args:
        storage: where Ray Train keeps its own state of the group `name`.
        logs, again: what an error points at, and what it says to do once the fault is mended.

    Raises:
        TenureError: a worker's fault that the user can mend, the death of a worker, or that of this process's node.
    """
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    for variable, value in _RAY_TRAIN.items():
        os.environ.setdefault(variable, value)
    trainer = TorchTrainer(
        function,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=worker_resources(scaling),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0),  # who calls this knows what is worth another attempt
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _explain(error, logs, again) from error
    except RayError as error:
        if is_home_gone():
            raise fail("the Ray node that the run's driver is on is gone", str(logs), f"go on with: {again}") from error
        lost = Problem(f"Ray Train's controller is gone: {_last_line(error)}", str(logs), f"go on with: {again}")
        raise WorkerLost(lost) from error


def is_home_gone() -> bool:
    """Whether the node that this process entered the cluster by is dead; nothing can be started from here then."""
    import ray

    home = ray.get_runtime_context().get_node_id()
    return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == home)


def free_groups() -> None:
    """Remove the placement groups of this job, which may hold only such as a dead controller left.

    Ray removes them itself as a rule, but a head that was restarted in the meantime does not, and they would hold their
    processors for as long as the job lasts.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    if ray.util.client.ray.is_connected():  # it does not tell ids as the cluster itself does
        return
    job = ray.get_runtime_context().get_job_id()
    for group, told in placement_group_table().items():
        if group.endswith(job) and told["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _explain(error: Any, logs: Path, again: str) -> TenureError:
    """The first worker's own TenureError where there is one; else what Ray says and where the logs are."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, TenureError):
                return cause
            cause = cause.__cause__ or getattr(cause, "_base_exc", None) or getattr(cause, "cause", None)
    reasons = sorted({_last_line(failure) for failure in failures.values()}) or [_last_line(error)]
    kind = OutOfMemory if any(_was_killed_for_memory(failure) for failure in failures.values()) else WorkerLost
    return kind(Problem("a worker failed: " + "; ".join(reasons), str(logs), f"once mended: {again}"))


def _was_killed_for_memory(failure: BaseException) -> bool:
    """Whether Ray ended a worker because its node ran out of memory."""
    return "OutOfMemoryError" in type(failure).__name__ or "killed due to memory pressure" in str(failure)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
