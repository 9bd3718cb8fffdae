"""Which parameters move: full tuning or adapters, applied to a loaded model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.strategy import Full, Lora

ADAPTER = "default"


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model on the CPU. Remote code is never run and only safetensors are read."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model


def apply_tuning(model: torch.nn.Module, tuning: Full | Lora) -> torch.nn.Module:
    """The model with exactly those parameters requiring gradients that the tuning moves."""
    if isinstance(tuning, Full):
        model.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    targets = tuning.target_modules
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=int(tuning.alpha) if float(tuning.alpha).is_integer() else tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    adapted: torch.nn.Module = get_peft_model(model, config)
    return adapted
