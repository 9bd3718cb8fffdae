"""The DeepSpeed engine of a run: one function of the spec and plan gives its whole configuration."""

from __future__ import annotations

import math
from typing import Any

import torch

from training.plan import Plan
from training.spec import RunSpec, Training

_NEVER = 10**9


def deepspeed_config(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration; every value follows from the spec and the plan."""
    half = spec.training.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm or 0.0,
        "zero_optimization": {"stage": plan.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": half},
        "communication_data_type": "fp32",
        "steps_per_print": _NEVER,
    }
    if half and plan.zero_stage > 0:
        # DeepSpeed has no fp32 accumulation at stage 0, which is why the planner never chooses it with bf16.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_optimizer(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW over the parameters that move; DeepSpeed puts its fp32 partitions in their place."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=fused or None
    )


def start_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, spec: RunSpec, plan: Plan) -> Any:
    """A DeepSpeed engine around the model, over the process group that Ray Train made."""
    import deepspeed
    import deepspeed.ops

    # None of DeepSpeed's own operators is used; probing for them runs compilers, and on a CPU builds one for a minute.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    config = deepspeed_config(spec, plan)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


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
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
