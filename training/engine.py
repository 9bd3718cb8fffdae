"""The DeepSpeed engine of a run: one function of the spec and plan gives its whole configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch

from training.one_worker import OneWorker
from training.plan import Plan
from training.protection.onepass import OnePassAdamW
from training.spec import RunSpec, Training
from training.strategy import Lora, acts_on_weights

RATE_RATIO = "rate_ratio"
_NEVER = 10**9
# DeepSpeed's own 500 million elements are allocated at every step of ZeRO 2, whatever the model's size.
_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration; every value follows from the spec and the plan."""
    clipping = 0.0 if _is_plain(spec, plan) else spec.training.max_grad_norm or 0.0
    config = _config(spec.training.precision, plan.zero_stage, plan.trainable_parameters, plan.accumulation_steps)
    return config | {
        "train_batch_size": plan.workers * plan.accumulation_steps * plan.micro_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_clipping": clipping,
    }


def _config(precision: str, zero_stage: int, parameters: int, accumulation: int) -> dict[str, Any]:
    """What every engine has, one row a micro-batch and no clipping: left out, DeepSpeed would clip at 1."""
    half = precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": min(_BUCKET_ELEMENTS, max(1, parameters)),
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": half},
        "communication_data_type": "fp32",
        "steps_per_print": _NEVER,
    }
    if half and zero_stage > 0:
        # DeepSpeed has no fp32 accumulation at stage 0, which is why bf16 is refused there.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_optimizer(model: torch.nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    """AdamW over the parameters that move; DeepSpeed puts its fp32 partitions in their place.

    On a GPU, pulls and paths on whole weights are part of its kernel. LoRA+ has LoRA's B in a group of its own (arXiv
    2402.12354), since that learns at another rate.
    """
    rate, decay = spec.training.learning_rate, spec.training.weight_decay
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ratio = spec.tuning.learning_rate_ratio if isinstance(spec.tuning, Lora) else 1.0
    fast = [parameter for name, parameter in moving.items() if ".lora_B." in name] if ratio != 1 else []
    slow = [parameter for name, parameter in moving.items() if not fast or ".lora_B." not in name]
    groups = [{"params": slow, RATE_RATIO: 1.0}, {"params": fast, RATE_RATIO: ratio}]
    moved = [group for group in groups if group["params"]]
    if torch.cuda.is_available() and (acts_on_weights(spec.tuning, spec.protections) or _in_one_pass(spec)):
        return OnePassAdamW(moved, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(moved, lr=rate, weight_decay=decay, fused=torch.cuda.is_available() or None)


def _in_one_pass(spec: RunSpec) -> bool:
    """Whether OneWorker's step can be one pass; for the few weights of LoRA it does not matter, which has hooks."""
    alone = spec.scaling.workers == 1 and spec.scaling.zero_stage == 0
    return alone and spec.training.precision == "bf16" and not isinstance(spec.tuning, Lora)


def start_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, spec: RunSpec, plan: Plan) -> Any:
    """The engine around the model: DeepSpeed's, over the process group that Ray Train made, or for one worker ours."""
    if plan.zero_stage == 0 and spec.training.precision == "bf16":
        return OneWorker(model, optimizer, plan.accumulation_steps, spec.training.max_grad_norm)
    deepspeed = _import_deepspeed()
    config = deepspeed_config(spec, plan)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if _is_plain(spec, plan):
        _clip_before_step(optimizer, spec.training.max_grad_norm or math.inf)
    return engine


def start_counting_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str, zero_stage: int, rounds: int
) -> Any:
    """An engine that accumulates `rounds` micro-batches of one example a worker, in fp32, and clips nothing."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stage = max(zero_stage, 1) if precision == "bf16" else zero_stage
    config = _config(precision, stage, count, rounds)
    engine, *_ = _import_deepspeed().initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def unclipping(engine: Any, max_grad_norm: float | None) -> Callable[[], torch.Tensor | float]:
    """The factor that undoes the clipping of the step being made: max(1, norm / max_norm)."""

    def factor() -> torch.Tensor | float:
        if max_grad_norm is None:
            return 1.0
        # DeepSpeed's engine knows that of the step before.
        norm = engine.global_norm if isinstance(engine, OneWorker) else engine.optimizer._global_grad_norm
        return torch.as_tensor((norm + 1e-6) / max_grad_norm).clamp(min=1.0)

    return factor


def _import_deepspeed() -> Any:
    """DeepSpeed, less what costs time at its start and is not used here.

    Its autotuner imports MLflow where there is one, for 1.5 s in every worker. Probing for its own operators runs
    compilers, and on a CPU builds one for a minute.
    """
    hidden = {"mlflow": None} if "mlflow" not in sys.modules else {}
    sys.modules.update(cast(dict[str, ModuleType], hidden))  # None makes an import fail, and DeepSpeed go without
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        for name in hidden:
            del sys.modules[name]
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def _is_plain(spec: RunSpec, plan: Plan) -> bool:
    """Whether DeepSpeed steps over the parameters themselves, with the client optimizer as it is."""
    return plan.zero_stage == 0 and spec.training.precision == "fp32"


def _clip_before_step(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip in a hook, and leave the norm where DeepSpeed looks for it: its own clipping at ZeRO 0 throws it away."""

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        vars(optimizer)["_global_grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def grad_norm(engine: Any) -> float | None:
    """The norm of the last step's whole gradient, before clipping; None when it is not finite."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None and math.isfinite(norm) else None


def learning_rate(training: Training, plan: Plan, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant, or down to 0 after the last step."""
    if step < plan.warmup_steps:
        return training.learning_rate * (step + 1) / plan.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    if training.schedule == "linear":
        return training.learning_rate * (1 - progress)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group: its share of the given one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_RATIO]
