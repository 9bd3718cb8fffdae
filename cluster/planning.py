"""`tenure plan`: the ZeRO stage, micro-batch and number of workers that suit a cluster, and what else would do.

Memory is arithmetic over the model's shapes (training/memory.py). Time is arithmetic too: floating-point operations
over what the GPU does of its peak in training. Both are estimates, and say what they assume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.machines import GIB, Gpu, Node
from training.errors import fail
from training.flops import flops_per_token, peak_flops
from training.memory import MemoryParts, frozen_memory, memory_parts
from training.models import ModelInfo
from training.plan import Plan
from training.spec import RunSpec
from training.strategy import is_adapter, tuning_refusal

# Share of peak of all operations made, those of layers run again among them: measured on one H100 by a plain loop with
# DeepSpeed, full tuning of 1.2 B (44 % of peak), and LoRA of 8 B with layers run again (29 %, or 44 % with what is made
# twice). On other GPUs it is a guess.
MADE_SHARE = 0.44
# Tokens a second and GPU of each ZeRO stage over those of one GPU, measured on two H200 in one host.
STAGE_SPEED = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.74}
_USABLE = 0.92  # the rest goes to the context, to NCCL's buffers and to what the allocator splits off
_MICRO = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Choice:
    """One way to run: what a worker needs in bytes, whether that fits, and what it costs; None where not known."""

    workers: int
    zero_stage: int
    micro_batch_size: int
    recomputes: bool
    memory: MemoryParts
    limit_bytes: int | None
    step_s: float | None
    hours: float | None
    price: float | None

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.memory.total <= self.limit_bytes

    @property
    def sort_key(self) -> tuple[bool, float, bool, int, int]:
        """Those that fit first, the fastest of them, with the least sharding, then the largest micro-batch."""
        short = 0.0 if self.fits else float(self.memory.total)
        return (not self.fits, short or self.step_s or 0.0, self.recomputes, self.zero_stage, -self.micro_batch_size)


def choices(
    spec: RunSpec, info: ModelInfo, plan: Plan, longest: int, nodes: Sequence[Node], gpu_hour: float | None = None
) -> list[Choice]:
    """All ways to run a spec on some nodes with its global batch, the best first.

    Args:
        longest: tokens of the longest row.
        gpu_hour: what a GPU hour costs.

    Raises:
        TenureError: the nodes hold not one worker.
    """
    check_room(spec, nodes)
    made = [
        _choice(_recomputing(spec, again), info, plan, longest, nodes, workers, stage, micro, gpu_hour)
        for again in sorted({spec.training.gradient_checkpointing, True})
        for workers in _worker_counts(spec, nodes)
        for stage in _stages(spec, workers)
        for micro in _micro_sizes(spec, plan, workers)
    ]
    return sorted(made, key=lambda choice: choice.sort_key)


def _recomputing(spec: RunSpec, again: bool) -> RunSpec:
    """The spec with or without layers that are run again."""
    return spec.model_copy(update={"training": spec.training.model_copy(update={"gradient_checkpointing": again})})


def _choice(
    spec: RunSpec,
    info: ModelInfo,
    plan: Plan,
    longest: int,
    nodes: Sequence[Node],
    workers: int,
    stage: int,
    micro: int,
    gpu_hour: float | None,
) -> Choice:
    scaled = spec.model_copy(update={"scaling": spec.scaling.model_copy(update={"workers": workers})})
    rows = micro * (2 if spec.objective.type == "dpo" else 1)
    frozen = frozen_memory(scaled, info, None, rows, longest)
    memory = memory_parts(scaled, info, plan.trainable_parameters, stage, rows, longest, frozen)
    step_s = step_seconds(spec, info, plan, longest, _gpu(nodes), workers, stage)
    hours = None if step_s is None else step_s * plan.steps / 3600
    price = None if hours is None or gpu_hour is None else hours * gpu_hour * workers
    again = spec.training.gradient_checkpointing
    return Choice(workers, stage, micro, again, memory, _limit(spec, nodes, workers), step_s, hours, price)


def step_seconds(
    spec: RunSpec, info: ModelInfo, plan: Plan, longest: int, gpu: Gpu | None, workers: int, stage: int
) -> float | None:
    """Seconds of an optimizer step; None on processors, and on GPUs whose peak is not known."""
    peak = peak_flops(gpu.name) if gpu and spec.scaling.gpus_per_worker else None
    if peak is None:
        return None
    tokens = plan.num_tokens_per_epoch / plan.steps_per_epoch
    speed = STAGE_SPEED[stage] if workers > 1 else 1.0
    return tokens * flops_per_token(spec, info, longest, made=True) / (workers * peak * MADE_SHARE * speed)


def _gpu(nodes: Sequence[Node]) -> Gpu | None:
    """The smallest GPU there is, which the others wait for."""
    return min((gpu for node in nodes for gpu in node.gpus), key=lambda gpu: gpu.memory_bytes, default=None)


def _limit(spec: RunSpec, nodes: Sequence[Node], workers: int) -> int | None:
    """Bytes that one worker may take."""
    if spec.scaling.gpus_per_worker:
        gpu = _gpu(nodes)
        return int(gpu.memory_bytes * _USABLE) if gpu and gpu.memory_bytes else None
    a_node = -(-workers // max(1, len(nodes)))
    return min((node.memory_bytes for node in nodes), default=0) // a_node or None


def room_on(spec: RunSpec, nodes: Sequence[Node]) -> int:
    """Workers that the nodes hold, whole workers on whole nodes."""
    scaling = spec.scaling
    by_cpus = [node.cpus // scaling.cpus_per_worker for node in nodes]
    if not scaling.gpus_per_worker:
        return sum(by_cpus)
    return sum(min(len(node.gpus), cpus) for node, cpus in zip(nodes, by_cpus, strict=True))


def check_room(spec: RunSpec, nodes: Sequence[Node]) -> None:
    """Refuse to plan for nodes that hold not one worker.

    Raises:
        TenureError: says what there is.
    """
    if room_on(spec, nodes):
        return
    scaling, cpus, gpus = spec.scaling, sum(node.cpus for node in nodes), sum(len(node.gpus) for node in nodes)
    wants = f"{scaling.cpus_per_worker} CPU" + (f" and {scaling.gpus_per_worker} GPU" * bool(scaling.gpus_per_worker))
    what = f"a worker wants {wants} of one node; there are {cpus} CPU and {gpus} GPU on {len(nodes)} nodes"
    raise fail(what, "scaling", "name another cluster by --address, plan for GPUs to be had by --gpus, or want less")


def short_of(spec: RunSpec, nodes: Sequence[Node]) -> str:
    """What is said where the spec's own number of workers has no room; nothing where it has."""
    room = room_on(spec, nodes)
    return f"the spec wants {spec.scaling.workers} workers; there is room for {room}" * (spec.scaling.workers > room)


def _worker_counts(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[int]:
    """The spec's own number, and powers of two that divide the global batch: those that there is room for."""
    room = room_on(spec, nodes)
    for count in sorted({spec.scaling.workers, *(2**power for power in range(12))}):
        if count <= room and spec.training.global_batch_size % count == 0:
            yield count


def _stages(spec: RunSpec, workers: int) -> Iterator[int]:
    """Stages that the tuning works at; one worker has nothing to shard."""
    least = 1 if spec.training.precision == "bf16" else 0
    for stage in range(least, 4 if workers > 1 else least + 1):
        if tuning_refusal(spec.tuning, stage, spec.scaling.gpus_per_worker) is None:
            yield stage


def _micro_sizes(spec: RunSpec, plan: Plan, workers: int) -> Iterator[int]:
    """Sizes that divide a worker's share; of packed rows the plan's own and smaller ones."""
    share = spec.training.global_batch_size // workers
    for size in sorted({*_MICRO, plan.micro_batch_size}):
        if (plan.row_tokens and size <= plan.micro_batch_size) or (not plan.row_tokens and share % size == 0):
            yield size


def advice(spec: RunSpec, best: Choice) -> str:
    """What to set, in the spec's own words; or what would help, where nothing fits."""
    if not best.fits:
        larger = "more or larger GPUs" if spec.scaling.gpus_per_worker else "more nodes"
        ways = [] if is_adapter(spec.tuning) else ["tuning: {type: lora}"]
        tried = ", ".join([*ways, "a smaller training.max_length", larger])
        return f"nothing fits: the least that a worker needs is {best.memory.total / GIB:.1f} GiB; try {tried}"
    scaling = f"scaling: {{workers: {best.workers}, zero_stage: {best.zero_stage}}}"
    again = ", gradient_checkpointing: true" if best.recomputes else ""
    return f"{scaling}, training: {{micro_batch_size: {best.micro_batch_size}{again}}}"


def nearest(made: Sequence[Choice], best: Choice) -> list[Choice]:
    """What differs from the best in one thing: the other stages, layers run again or not, and the best of every other
    number of workers."""
    beside = [c for c in made if _differences(c, best) == 1 and c.workers == best.workers]
    others: dict[int, Choice] = {}
    for choice in made:
        if choice.workers != best.workers:
            others.setdefault(choice.workers, choice)
    return beside + list(others.values())


def _differences(one: Choice, best: Choice) -> int:
    """In how many ways two choices differ; another micro-batch alone is not told."""
    if one.micro_batch_size != best.micro_batch_size:
        return 9
    return (one.zero_stage != best.zero_stage) + (one.recomputes != best.recomputes)
