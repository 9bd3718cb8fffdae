"""Every way parameters can move: trained on two workers at ZeRO 0, 2 and 3, exported, reloaded and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import JobValues, losses, plan_job, run_of, train_in_group, write_spec
from transformers import AutoModelForCausalLM

from training.encoding import Encoded
from training.peft_methods import REFUSED_METHODS, method_names
from training.worker import Trainer
from training.workspace import RunFolder, Workspace

IDS = (5, 9, 17, 33, 65, 129, 3, 77, 101, 44, 8, 19)
STAGES = (0, 2, 3)
NEEDED: dict[str, dict[str, Any]] = {"trainable_tokens": {"token_indices": [1, 2, 48, 49, 50, 51, 52]}}
PEFT = {name: {"type": name, "options": NEEDED.get(name, {})} for name in method_names()}
LORA: dict[str, dict[str, Any]] = {
    "rslora": {"options": {"use_rslora": True}},
    "dora": {"options": {"use_dora": True}},
    "pissa": {"options": {"init_lora_weights": "pissa"}},
    "pissa rslora": {"options": {"init_lora_weights": "pissa_niter_4", "use_rslora": True}},
    "olora": {"options": {"init_lora_weights": "olora"}},
    "orthogonal": {"options": {"init_lora_weights": "orthogonal"}},
    "lora plus": {"learning_rate_ratio": 8.0},
    "one layer": {"options": {"layers_to_transform": [1]}},
    "patterns": {"options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}},
    "saved head": {"options": {"modules_to_save": ["lm_head"]}},
}
TUNINGS: dict[str, dict[str, Any]] = {
    **PEFT,
    **{name: {"type": "lora", "rank": 4, "alpha": 8, **keys} for name, keys in LORA.items()},
    "partial": {"type": "partial", "parameters": ["model.layers.1.mlp.*", "*.input_layernorm.weight"]},
}
TRAINING: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "micro_batch_size": 4,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "validation_items": 0,
    "validate_every_steps": 0,
    "checkpoint_every_steps": 0,
}


def keep_logits(trainer: Trainer, folder: RunFolder) -> None:
    """The live model's logits for all but the last of IDS, as what its output head gives out."""
    seen: list[torch.Tensor] = []
    head = trainer.engine.module.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().cpu()))
    trainer.engine.eval()
    with torch.no_grad():
        trainer._loss_sum([Encoded(IDS, (False,) + (True,) * (len(IDS) - 1))])
    hook.remove()
    if dist.get_rank() == 0:
        torch.save(torch.cat(seen), folder.path / "logits.pt")


@pytest.fixture(scope="module")
def jobs(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobValues]:
    """Jobs by "TUNING STAGE", each trained by two workers."""
    folder = tmp_path_factory.mktemp("tunings")
    workspace = Workspace.at(folder / "workspace")
    planned = {}
    for name, tuning in TUNINGS.items():
        for stage in STAGES:
            path = write_spec(
                folder / f"{name}-{stage}",
                tiny_model,
                tuning=tuning,
                training=TRAINING,
                scaling={"workers": 2, "zero_stage": stage},
            )
            planned[f"{name} {stage}"] = plan_job(path, workspace)
    train_in_group(list(planned.values()), 2, folder / "ray", after=keep_logits)
    return planned


def test_x(jobs):
    for name in TUNINGS:
        print(name)
