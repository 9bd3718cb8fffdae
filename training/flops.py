"""Arithmetic of a training step, and what GPUs make of it at most. Free of torch."""

from __future__ import annotations

from training.models import ModelInfo
from training.spec import RunSpec
from training.strategy import is_adapter

# Dense bf16 operations a second of peak, by a part of the driver's name for the GPU (the makers' data sheets).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}


def flops_per_token(spec: RunSpec, info: ModelInfo, longest: int, made: bool = False) -> float:
    """Operations of a token's forward and backward pass (arXiv 2204.02311, appendix B).

    Six a parameter, or four where the base is frozen and only passes gradients on; and attention over half the row.
    `made` counts those too that are made twice, where layers are run again.
    """
    a_parameter = (4 if is_adapter(spec.tuning) else 6) + (2 if made and spec.training.gradient_checkpointing else 0)
    return a_parameter * info.num_parameters + a_parameter * info.num_layers * info.hidden_size * longest


def peak_flops(name: str) -> float | None:
    """Peak of the GPU of that name: that of the longest name known that is a part of it."""
    known = [part for part in PEAK_FLOPS if part in name.upper()]
    return PEAK_FLOPS[max(known, key=len)] if known else None
