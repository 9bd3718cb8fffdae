"""What is worth another attempt after a failure, how, and after what wait. Free of torch and ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from training.errors import OutOfMemory, StorageFault, TenureError, WorkerLost
from training.plan import Plan
from training.spec import RunSpec

Cause = Literal["lost", "hang", "memory", "storage"]
# Seconds before the first attempt after a failure, doubled with every further one, and the most. A share that fails has
# been waited for already, by the worker.
WAITS_S: dict[Cause, tuple[float, float]] = {
    "lost": (2.0, 60.0),
    "hang": (5.0, 60.0),
    "memory": (2.0, 60.0),
    "storage": (30.0, 300.0),
}


def cause_of(error: TenureError, hung: bool) -> Cause | None:
    """Why an attempt failed; None for what would fail again, such as a loss that is no number or a full disk."""
    if isinstance(error, OutOfMemory):
        return "memory"
    if isinstance(error, StorageFault):
        return "storage"
    if isinstance(error, WorkerLost):
        return "hang" if hung else "lost"
    return None


def wait_s(cause: Cause, failures: int) -> float:
    """Seconds to wait after the failure of that number, from 1."""
    first, most = WAITS_S[cause]
    return float(min(most, first * 2 ** (failures - 1)))


def smaller_micro_batch(spec: RunSpec, plan: Plan) -> int | None:
    """The next smaller micro-batch with the same global batch; None at one row, or where the spec gives it."""
    if spec.training.micro_batch_size != "auto" or plan.micro_batch_size == 1:
        return None
    if plan.row_tokens:
        return plan.micro_batch_size // 2
    share = plan.global_batch_size // plan.workers
    return max(rows for rows in range(1, plan.micro_batch_size) if share % rows == 0)


def with_micro_batch(plan: Plan, micro: int) -> Plan:
    """A plan whose steps go through the same rows in micro-batches of another size."""
    rows = plan.accumulation_steps * plan.micro_batch_size
    return replace(plan, micro_batch_size=micro, accumulation_steps=-(-rows // micro))


def worker_counts(spec: RunSpec) -> list[int]:
    """Numbers of workers that a run may go on with, the most first; one for a run that is not elastic."""
    training, scaling = spec.training, spec.scaling
    each = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    counts = range(scaling.workers, (scaling.min_workers or scaling.workers) - 1, -1)
    return [count for count in counts if training.global_batch_size % (count * each) == 0]
