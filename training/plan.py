"""What a run will do and what it will need, before anything expensive starts. Free of torch."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from training.errors import Problem, TenureError
from training.models import ModelInfo
from training.spec import RunSpec
from training.strategy import (
    AnyTuning,
    Ewc,
    Full,
    L2sp,
    Lora,
    Si,
    is_adapter,
    merges_by_itself,
    records_path,
    tuning_refusal,
)

GIB = 2**30
_ADAM_STATES = 2
_CPU_ROWS = 8
_GPU_ROWS = 8
# Four bits a weight, and the scales of double quantisation (arXiv 2305.14314, section 3)
_NF4_BYTES = 0.52
_OVERHEAD_BYTES = int(1.2 * GIB)


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
    memory_per_worker_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class DataCounts:
    """What the encoded training set holds."""

    num_examples: int
    num_tokens: int
    num_target_tokens: int
    longest: int
    num_overlong: int


def make_plan(spec: RunSpec, info: ModelInfo, counts: DataCounts, memory_limit_bytes: int | None) -> Plan:
    """The plan of a run.

    Args:
        memory_limit_bytes: what one worker may take, or None where that is not known.

    Raises:
        TenureError: the run cannot fit into the memory of a worker, or max_length exceeds the model's positions.
    """
    training, scaling = spec.training, spec.scaling
    if info.max_positions and counts.longest > info.max_positions:
        what = f"examples have up to {counts.longest} tokens, but the model has {info.max_positions} positions"
        raise TenureError(Problem(what, "data", f"set training.max_length: {info.max_positions} and data.overlong"))
    micro = _micro_batch_size(spec)
    trainable = count_trainable(spec.tuning, info)
    stage = _zero_stage(spec, info, trainable, micro, counts.longest, memory_limit_bytes)
    memory = estimate_memory(spec, info, trainable, stage, micro, counts.longest)
    if memory_limit_bytes is not None and memory > memory_limit_bytes:
        raise TenureError(_does_not_fit(spec, memory, memory_limit_bytes, stage, micro))
    steps_per_epoch = math.ceil(counts.num_examples / training.global_batch_size)
    steps = steps_per_epoch * training.epochs
    steps = min(steps, training.max_steps) if training.max_steps else steps
    return Plan(
        model_parameters=info.num_parameters,
        trainable_parameters=trainable,
        zero_stage=stage,
        workers=scaling.workers,
        micro_batch_size=micro,
        accumulation_steps=training.global_batch_size // (scaling.workers * micro),
        global_batch_size=training.global_batch_size,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(training.warmup_ratio * steps),
        validate_every_steps=_every(training.validate_every_steps, steps, parts=4),
        checkpoint_every_steps=_every(training.checkpoint_every_steps, steps, parts=4),
        num_examples=counts.num_examples,
        num_tokens_per_epoch=counts.num_tokens,
        num_target_tokens_per_epoch=counts.num_target_tokens,
        num_overlong=counts.num_overlong,
        memory_per_worker_bytes=memory,
        disk_bytes=estimate_disk(spec, info, trainable),
    )


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


def lora_shapes(tuning: Lora, info: ModelInfo) -> dict[str, tuple[int, int]]:
    """The linear weights that LoRA adapts, by name.

    Raises:
        TenureError: a target names no linear module of the model.
    """
    if tuning.target_modules == "all-linear":
        return info.linear_shapes
    known = sorted({name.split(".")[-2] for name in info.linear_shapes})
    problems = [
        Problem(f"'{target}' names no linear module", "tuning.target_modules", f"known: {', '.join(known)}")
        for target in tuning.target_modules
        if not any(_is_target(name, target) for name in info.linear_shapes)
    ]
    if problems:
        raise TenureError(problems)
    wanted = tuning.target_modules
    return {n: shape for n, shape in info.linear_shapes.items() if any(_is_target(n, target) for target in wanted)}


def _is_target(name: str, target: str) -> bool:
    return fnmatch.fnmatch(name, f"*.{target}.weight")


def estimate_memory(spec: RunSpec, info: ModelInfo, trainable: int, stage: int, micro: int, longest: int) -> int:
    """Bytes that one worker needs at its peak: weights, gradients, optimizer, activations, logits, runtime."""
    workers = spec.scaling.workers
    width = 2 if spec.training.precision == "bf16" else 4
    stored = _NF4_BYTES if isinstance(spec.tuning, Lora) and spec.tuning.bits else width
    weights = info.num_parameters * stored / (workers if stage == 3 else 1)
    gradients = trainable * width / (workers if stage >= 2 else 1)
    masters = trainable * 4 if width == 2 else 0
    states = (trainable * 4 * _ADAM_STATES + masters) / (workers if stage >= 1 else 1)
    kept = protection_bytes(spec, info, trainable) / (workers if stage >= 1 else 1)
    # 34 bytes a position, layer and hidden unit in 16 bits (arXiv 2205.05198, equation 2, without attention scores)
    activations = 34 / 2 * width * micro * longest * info.hidden_size * info.num_layers
    logits = 3 * 4 * micro * longest * info.vocab_size / 2
    return int(weights + gradients + states + kept + activations + logits + _OVERHEAD_BYTES)


def protection_bytes(spec: RunSpec, info: ModelInfo, trainable: int) -> int:
    """Bytes that protections keep over all workers, each of which holds its share from ZeRO 1 on.

    An anchor a weight, and its importance; for LoRA the importance of the adapted weights. A path being recorded
    takes its sum and its start, and within a step the weights and gradients of before.
    """
    total = 0
    for protection in spec.protections:
        if isinstance(protection, L2sp | Ewc | Si):
            width = 2 if not isinstance(protection, L2sp) and protection.stored == "bf16" else 4
            weighs = not isinstance(protection, L2sp)
            if isinstance(spec.tuning, Lora):
                total += 4 * sum(math.prod(shape) for shape in lora_shapes(spec.tuning, info).values()) * weighs
            else:
                recorded = isinstance(protection, Si) and records_path(protection, spec.tuning)
                total += trainable * width * (1 + weighs) + trainable * 16 * recorded
    return total


def estimate_disk(spec: RunSpec, info: ModelInfo, trainable: int) -> int:
    """Bytes that checkpoints (one more than are kept) and the artifact take."""
    checkpoint = trainable * 4 * (2 + _ADAM_STATES)
    adapter = is_adapter(spec.tuning)
    merged = info.num_parameters * 4 if (adapter and spec.export.merged) or merges_by_itself(spec.tuning) else 0
    artifact = trainable * 4 if adapter else info.num_parameters * 4
    return checkpoint * (spec.training.keep_checkpoints + 1) + artifact + merged


def _micro_batch_size(spec: RunSpec) -> int:
    """The given one, or the largest divisor of a worker's share up to a bound that suits the hardware."""
    given = spec.training.micro_batch_size
    if given != "auto":
        return given
    per_worker = spec.training.global_batch_size // spec.scaling.workers
    bound = _GPU_ROWS if spec.scaling.gpus_per_worker else _CPU_ROWS
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
    ways += [] if is_adapter(spec.tuning) else ["tuning.type: lora"]
    ways += ["a smaller training.max_length", "more workers on more machines"]
    return Problem(what, "scaling", f"try {', '.join(ways)}")


def _every(given: int | str, steps: int, parts: int) -> int:
    """Every how many steps; 0 means never before the end."""
    return given if isinstance(given, int) else max(1, math.ceil(steps / parts))
