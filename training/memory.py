"""What one worker needs of its memory, part by part. Free of torch."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from training.errors import Problem, TenureError
from training.models import ModelInfo
from training.spec import RunSpec
from training.strategy import Distill, Ewc, Kl, L2sp, Lora, Si, is_adapter, moves_base, records_path

ADAM_STATES = 2
# Four bits a weight, and the scales of double quantisation (arXiv 2305.14314, section 3)
_NF4_BYTES = 0.52
_OVERHEAD_BYTES = int(1.2 * 2**30)
FUSED_CHUNK_BYTES = 2**30  # of logits, see objective/fused.py


@dataclass(frozen=True)
class MemoryParts:
    """Bytes that one worker needs at its peak, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's moments and, in bf16, the fp32 masters."""
    protections: int
    activations: int
    logits: int
    frozen: int
    """A teacher, and a second set of logits to compare with."""
    overhead: int
    """The libraries themselves, and what the allocator cannot use."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory_parts(
    spec: RunSpec, info: ModelInfo, trainable: int, stage: int, micro: int, longest: int, frozen: int = 0
) -> MemoryParts:
    """What one worker needs at its peak, at a ZeRO stage (arXiv 1910.02054, section 5).

    Args:
        trainable: parameters that move.
        micro, longest: rows of a micro-batch, and tokens of the longest.
        frozen: bytes of what a step compares with, see frozen_memory().
    """
    workers = spec.scaling.workers
    width = 2 if spec.training.precision == "bf16" else 4
    stored = _NF4_BYTES if isinstance(spec.tuning, Lora) and spec.tuning.bits else width
    masters = trainable * 4 if width == 2 else 0
    return MemoryParts(
        weights=int(info.num_parameters * stored / (workers if stage == 3 else 1)),
        gradients=int(trainable * width / (workers if stage >= 2 else 1)),
        optimizer=int((trainable * 4 * ADAM_STATES + masters) / (workers if stage >= 1 else 1)),
        protections=int(protection_bytes(spec, info, trainable) / (workers if stage >= 1 else 1)),
        activations=int(width / 2 * micro * longest * activation_bytes(spec, info)),
        logits=logits_bytes(spec, info, micro * longest, width),
        frozen=frozen,
        overhead=_OVERHEAD_BYTES,
    )


def activation_bytes(spec: RunSpec, info: ModelInfo) -> float:
    """Bytes a token, over all layers, that a forward pass in 16 bits keeps for its backward pass.

    Counted in Llama's layers (torch.autograd.graph.saved_tensors_hooks): 21 a hidden unit, or 17 beside a frozen base,
    whose weights ask for no gradients; and 8 an inner unit of the MLP. Liger's norms keep their input alone, and its
    activation what it is made of: 13 and 6. Where layers are run again, those of one layer, and the inputs of all.
    """
    inner = max((max(shape) for shape in info.linear_shapes.values()), default=4 * info.hidden_size)
    has_liger = spec.scaling.gpus_per_worker > 0 and spec.training.kernels in ("auto", "liger")
    of_hidden, of_inner = (13, 6) if has_liger else (17 if is_adapter(spec.tuning) else 21, 8)
    a_layer = of_hidden * info.hidden_size + of_inner * inner
    if spec.training.gradient_checkpointing:
        return a_layer + 2 * info.num_layers * info.hidden_size
    return info.num_layers * a_layer


def logits_bytes(spec: RunSpec, info: ModelInfo, tokens: int, width: int) -> int:
    """Bytes of logits and what a loss makes of them: of all targets, half the tokens, or of a chunk where it is fused.

    Fused, the head's own gradient is added up in fp32 beside a product in the weights' dtype.
    """
    if not _fuses(spec):
        return int(3 * 4 * tokens * info.vocab_size / 2)
    chunk = 2 * min(FUSED_CHUNK_BYTES, tokens * info.vocab_size * width)
    return chunk + (0 if is_adapter(spec.tuning) else info.vocab_size * info.hidden_size * (4 + width))


def _fuses(spec: RunSpec) -> bool:
    """Whether the loss may be fused; the model has its say before the first step."""
    has_other_terms = any(isinstance(protection, Kl) for protection in spec.protections)
    return spec.training.fused_loss and spec.objective.type in ("sft", "lm") and not has_other_terms


def estimate_memory(spec: RunSpec, info: ModelInfo, trainable: int, stage: int, micro: int, longest: int) -> int:
    """Bytes that one worker needs at its peak, without what is frozen beside; see memory_parts()."""
    return memory_parts(spec, info, trainable, stage, micro, longest).total


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


def frozen_memory(spec: RunSpec, info: ModelInfo, teacher: ModelInfo | None, rows: int, longest: int) -> int:
    """Bytes for what a step compares with: a teacher that runs beside, and a second set of logits."""
    width = 2 if spec.training.precision == "bf16" else 4
    online = teacher if isinstance(spec.objective, Distill) and spec.objective.top_k is None else None
    reads_base = spec.objective.type == "dpo" or any(isinstance(protection, Kl) for protection in spec.protections)
    compares = online is not None or (reads_base and not moves_base(spec.tuning))
    logits = 4 * rows * longest * info.vocab_size if compares else 0
    return (online.num_parameters * width if online else 0) + logits


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
