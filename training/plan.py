"""What a run will do and what it will need, before anything expensive starts. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from training.data.mixture import Task, tasks_of
from training.data.packing import looked_at, most_rows
from training.data.schedule import Schedule, schedule_of
from training.data.store import Numbers
from training.errors import Problem, TenureError, fail
from training.memory import ADAM_STATES, estimate_memory, frozen_memory, lora_shapes
from training.models import ModelInfo
from training.spec import RunSpec, may_pack
from training.strategy import (
    AnyTuning,
    Distill,
    Full,
    Kl,
    Lora,
    Replay,
    Wise,
    is_adapter,
    merges_by_itself,
    moves_base,
    tuning_refusal,
)

GIB = 2**30
_CPU_ROWS = 8
_GPU_ROWS = 8
_GPU_TOKENS = 16_384  # of a micro-batch of packed rows: more make no step faster


class PlannedTask(TypedDict):
    """A named source's part of an epoch: its examples, and the rows and target tokens that an epoch takes of it.

    Shares are of the training rows and their target tokens; those of tokens are expected, since an epoch that does not
    take every example takes any.
    """

    name: str
    num_examples: int
    num_rows_per_epoch: int
    asked_share: float
    row_share: float
    target_token_share: float


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run; counts are of parameters, examples, tokens and optimizer steps."""

    model_parameters: int
    trainable_parameters: int
    zero_stage: int
    workers: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    validate_every_steps: int
    checkpoint_every_steps: int
    num_examples: int
    num_tokens_per_epoch: int
    num_target_tokens_per_epoch: int
    num_overlong: int
    num_replay: int
    replay_per_batch: int
    replay_token_share: float | None
    tasks: tuple[PlannedTask, ...]
    memory_per_worker_bytes: int
    disk_bytes: int
    row_tokens: int = 0
    num_untaught: int = 0
    num_faulty: int = 0


class SourceCounts(NamedTuple):
    """Examples and tokens of one source."""

    num_examples: int
    num_tokens: int
    num_target_tokens: int


@dataclass(frozen=True)
class DataCounts:
    """What the encoded training set holds, and the replay rows beside it (none yet, when the base will write them).

    `longest` is over all rows, those to be written included. `sources` are the training sources in their order, and
    needed where they are tasks. `lengths` (examples,) are tokens of all but those to be written, and needed where
    examples are packed.
    """

    num_examples: int
    num_tokens: int
    num_target_tokens: int
    longest: int
    num_overlong: int
    num_replay: int = 0
    num_replay_target_tokens: int = 0
    lengths: Numbers | None = field(default=None, compare=False)
    num_untaught: int = 0
    num_faulty: int = 0
    sources: tuple[SourceCounts, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of every source; of all together where they are not told apart."""
        return tuple(source.num_examples for source in self.sources) or (self.num_examples,)


def make_plan(
    spec: RunSpec,
    info: ModelInfo,
    counts: DataCounts,
    memory_limit_bytes: int | None,
    teacher: ModelInfo | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        memory_limit_bytes: what one worker may take, or None where that is not known.
        teacher: the model that is distilled from, if any.

    Raises:
        TenureError: the run cannot fit into the memory of a worker, or rows are longer than a model's positions.
    """
    training, scaling = spec.training, spec.scaling
    for model, name in ((info, "model"), (teacher, "teacher")):
        if model and model.max_positions and counts.longest > model.max_positions:
            what = f"examples have up to {counts.longest} tokens, but the {name} has {model.max_positions} positions"
            instead = f"set training.max_length: {model.max_positions} and data.overlong"
            raise TenureError(Problem(what, "data", instead))
    replay_per_batch = count_replayed(spec)
    capacity = row_tokens(spec)
    packed_rows = _packed_rows(spec, counts, replay_per_batch, capacity)
    longest = capacity or counts.longest
    micro = _micro_batch_size(spec, packed_rows, capacity)
    rows = micro * (2 if spec.objective.type == "dpo" else 1)
    trainable = count_trainable(spec.tuning, info)
    beside = frozen_memory(spec, info, teacher, rows, longest)
    left = None if memory_limit_bytes is None else memory_limit_bytes - beside
    stage = _zero_stage(spec, info, trainable, rows, longest, left)
    memory = estimate_memory(spec, info, trainable, stage, rows, longest) + beside
    if memory_limit_bytes is not None and memory > memory_limit_bytes:
        raise TenureError(_does_not_fit(spec, memory, memory_limit_bytes, stage, micro))
    schedule = schedule_of(spec, counts.sizes, counts.num_replay, replay_per_batch)
    steps, steps_per_epoch = schedule.num_steps, schedule.steps_per_epoch
    tasks = tasks_of(spec.data, counts.sizes, training.global_batch_size - replay_per_batch)
    epoch = _epoch_counts(counts, schedule)
    return Plan(
        model_parameters=info.num_parameters,
        trainable_parameters=trainable,
        zero_stage=stage,
        workers=scaling.workers,
        micro_batch_size=micro,
        accumulation_steps=-(-(packed_rows or training.global_batch_size) // (scaling.workers * micro)),
        global_batch_size=training.global_batch_size,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(training.warmup_ratio * steps),
        validate_every_steps=_every(training.validate_every_steps, steps, parts=4),
        checkpoint_every_steps=_every(training.checkpoint_every_steps, steps, parts=4),
        num_examples=counts.num_examples,
        num_tokens_per_epoch=epoch.num_tokens,
        num_target_tokens_per_epoch=epoch.num_target_tokens,
        num_overlong=counts.num_overlong,
        num_replay=_count_replay(spec, counts),
        replay_per_batch=replay_per_batch,
        replay_token_share=_replay_token_share(counts, epoch, steps_per_epoch * replay_per_batch),
        tasks=_planned_tasks(tasks, counts, epoch),
        memory_per_worker_bytes=memory,
        disk_bytes=estimate_disk(spec, info, trainable) + estimate_signals(spec, counts),
        row_tokens=capacity,
        num_untaught=counts.num_untaught,
        num_faulty=counts.num_faulty,
    )


def row_tokens(spec: RunSpec) -> int:
    """Tokens of a packed row, or 0 where examples are not packed. Where they may be, this loads torch.

    Raises:
        TenureError: they must be, and the model, or its teacher, cannot keep them apart.
    """
    if not may_pack(spec):
        return 0
    from training.attention import refusal

    models = [spec.model, spec.objective.teacher] if isinstance(spec.objective, Distill) else [spec.model]
    reason = next(filter(None, (refusal(Path(model)) for model in models)), None)
    if reason and spec.training.packing is True:
        raise fail(f"{reason}, which cannot be packed", "training.packing", "set training.packing: false")
    return 0 if reason else spec.training.max_length


def _packed_rows(spec: RunSpec, counts: DataCounts, replay_per_batch: int, capacity: int) -> int:
    """The most rows that a global batch is packed into; 0 where examples are not packed.

    Rows that the base has yet to write count as the longest that it may.
    """
    if not capacity:
        return 0
    assert counts.lengths is not None
    num_replay = _count_replay(spec, counts)
    schedule = schedule_of(spec, counts.sizes, num_replay, replay_per_batch)
    to_come = counts.num_examples + num_replay - len(counts.lengths)
    lengths = np.concatenate([counts.lengths, np.full(to_come, counts.longest)])
    batches = (schedule.batch(step) for step in looked_at(schedule.num_steps))
    return most_rows(batches, lengths, capacity)


def count_replayed(spec: RunSpec) -> int:
    """Replay rows in every global batch."""
    replay = spec.protection(Replay)
    return replay.rows_in(spec.training.global_batch_size) if replay else 0


def describe_replay(plan: Plan, asked: float) -> str:
    """What a run replays, in words: rows a batch, their planned share, and where that is not the one asked for."""
    size, rows = plan.global_batch_size, plan.replay_per_batch
    text = f"{rows} of {size} rows a batch ({rows / size:.1%}; {asked:.1%} asked for"
    text += f", which rounds to {round(asked * size)} rows)" if round(asked * size) in (0, size) else ")"
    if plan.replay_token_share is not None:
        text += f", about {plan.replay_token_share:.1%} of the target tokens"
    return f"{text}, from {plan.num_replay:,} rows"


def _count_replay(spec: RunSpec, counts: DataCounts) -> int:
    """How many rows there are to replay, or how many the base is to write."""
    replay = spec.protection(Replay)
    return replay.generate.examples if replay and replay.generate else counts.num_replay


def _replay_token_share(counts: DataCounts, epoch: SourceCounts, replayed_rows: int) -> float | None:
    """The expected share of an epoch's target tokens that are replayed; None where the base has yet to write them."""
    if not counts.num_replay:
        return None
    replayed = replayed_rows * counts.num_replay_target_tokens / counts.num_replay
    return replayed / (replayed + epoch.num_target_tokens)


def _epoch_counts(counts: DataCounts, schedule: Schedule) -> SourceCounts:
    """Training rows of an epoch and their tokens; expected ones where it takes some of a task's examples."""
    if not schedule.tasks:
        return SourceCounts(counts.num_examples, counts.num_tokens, counts.num_target_tokens)
    parts = list(zip(schedule.tasks, counts.sources, strict=True))
    tokens = round(sum(task.rows * source.num_tokens / task.size for task, source in parts))
    targets = round(sum(task.rows * source.num_target_tokens / task.size for task, source in parts))
    return SourceCounts(schedule.rows_per_epoch, tokens, targets)


def _planned_tasks(tasks: tuple[Task, ...], counts: DataCounts, epoch: SourceCounts) -> tuple[PlannedTask, ...]:
    return tuple(
        PlannedTask(
            name=task.name,
            num_examples=task.size,
            num_rows_per_epoch=task.rows,
            asked_share=task.asked,
            row_share=task.rows / epoch.num_examples,
            target_token_share=task.rows * source.num_target_tokens / task.size / epoch.num_target_tokens,
        )
        for task, source in zip(tasks, counts.sources, strict=False)
    )


def describe_tasks(tasks: Sequence[PlannedTask]) -> list[str]:
    """What an epoch takes of every task, a line each."""
    return [
        f"{task['name']}: {task['num_rows_per_epoch']:,} rows an epoch of {task['num_examples']:,} examples, "
        f"{task['row_share']:.1%} of the rows ({task['asked_share']:.1%} asked for), "
        f"about {task['target_token_share']:.1%} of the target tokens"
        for task in tasks
    ]


def count_trainable(tuning: AnyTuning, info: ModelInfo) -> int:
    """How many parameters move. Beyond full tuning and plain LoRA this loads torch and PEFT and builds the model.

    Raises:
        TenureError: the tuning names what the model does not have, or PEFT cannot put it on the model.
    """
    if isinstance(tuning, Full):
        return info.num_parameters
    if isinstance(tuning, Lora):
        shapes = lora_shapes(tuning, info)
        if not set(tuning.options) - {"init_lora_weights", "use_rslora"}:
            return sum(tuning.rank * (rows + columns) for rows, columns in shapes.values())
    from training.tuning import count_moving

    return count_moving(tuning, info.path)


def estimate_signals(spec: RunSpec, counts: DataCounts) -> int:
    """Bytes on disk of what frozen models say about training and replay rows: for a target k ids and k + 1 numbers."""
    kept = [p.top_k for p in spec.protections if isinstance(p, Kl)] if moves_base(spec.tuning) else []
    kept += [spec.objective.top_k] if isinstance(spec.objective, Distill) and spec.objective.top_k else []
    replay = spec.protection(Replay)
    to_write = replay.generate.examples * counts.longest if replay and replay.generate else 0
    targets = counts.num_target_tokens + counts.num_replay_target_tokens + to_write
    return targets * sum(8 + 8 * k for k in kept)


def estimate_disk(spec: RunSpec, info: ModelInfo, trainable: int) -> int:
    """Bytes that checkpoints (one more than are kept) and the artifact take."""
    checkpoint = trainable * 4 * (2 + ADAM_STATES)
    adapter = is_adapter(spec.tuning)
    merged = info.num_parameters * 4 if (adapter and spec.export.merged) or merges_by_itself(spec.tuning) else 0
    artifact = trainable * 4 if adapter else info.num_parameters * 4
    copies = 2 if spec.protection(Wise) else 1  # what was tuned stays beside what is exported
    kept = spec.training.keep_checkpoints + spec.training.keep_best_checkpoints + 1
    return checkpoint * kept + copies * (artifact + merged)


def _micro_batch_size(spec: RunSpec, packed_rows: int, capacity: int) -> int:
    """The given one, or the largest divisor of a worker's share up to a bound that suits the hardware.

    Of packed rows it need not be a divisor, since spare ones are empty, and one row keeps a processor busy.
    """
    given = spec.training.micro_batch_size
    if given != "auto":
        return given
    gpus, per_worker = spec.scaling.gpus_per_worker, spec.training.global_batch_size // spec.scaling.workers
    bound = _GPU_ROWS if gpus else _CPU_ROWS
    if packed_rows:
        filling = min(bound, max(1, _GPU_TOKENS // capacity)) if gpus else 1
        return min(filling, -(-packed_rows // spec.scaling.workers))
    return max(rows for rows in range(1, min(bound, per_worker) + 1) if per_worker % rows == 0)


def _zero_stage(
    spec: RunSpec, info: ModelInfo, trainable: int, micro: int, longest: int, limit_bytes: int | None
) -> int:
    """The given stage, or the least sharding that fits (the most, when none does)."""
    given = spec.scaling.zero_stage
    if given != "auto":
        return given
    # ZeRO 1 is the first stage at which DeepSpeed accumulates bf16 gradients in fp32.
    least = 1 if spec.training.precision == "bf16" else 0
    stages = [s for s in range(least, 4) if tuning_refusal(spec.tuning, s, spec.scaling.gpus_per_worker) is None]
    if limit_bytes is None or spec.scaling.workers == 1:
        return stages[0]
    fits = (s for s in stages if estimate_memory(spec, info, trainable, s, micro, longest) <= limit_bytes)
    return next(fits, stages[-1])


def _does_not_fit(spec: RunSpec, memory: int, limit: int, stage: int, micro: int) -> Problem:
    what = f"a worker needs about {memory / GIB:.1f} GiB and may take {limit / GIB:.1f} GiB"
    ways = [f"training.micro_batch_size below {micro}"] if micro > 1 else []
    ways += [f"scaling.zero_stage above {stage}"] if stage < 3 and spec.scaling.workers > 1 else []
    ways += ["objective.top_k, which caches the teacher"] if spec.objective.type == "distill" else []
    ways += [] if is_adapter(spec.tuning) else ["tuning.type: lora"]
    ways += [] if spec.training.gradient_checkpointing else ["training.gradient_checkpointing: true"]
    ways += ["a smaller training.max_length", "more workers on more machines"]
    return Problem(what, "scaling", f"try {', '.join(ways)}")


def _every(given: int | str, steps: int, parts: int) -> int:
    """Every how many steps; 0 means never before the end."""
    return given if isinstance(given, int) else max(1, math.ceil(steps / parts))
