"""Writes the artifact of a run: safetensors with tokenizer, chat template and generation config."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from training.errors import fail
from training.models import hash_folder
from training.spec import RunSpec
from training.tuning import load_base
from training.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINEAGE_FILE = "tenure.json"
MERGED_FOLDER = "merged"


def gather_masters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole fp32 masters of all parameters that move, by name, on rank 0 (elsewhere empty). All ranks call it.

    Raises:
        TenureError: a gathered tensor does not have its parameter's shape.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            full = parameter.detach() if full is None else full
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(full.shape) != shape:
                raise fail(f"'{name}' was gathered as {tuple(full.shape)}, not {shape}", "export", "report this")
            if dist.get_rank() == 0:
                gathered[name] = full.detach().to("cpu", torch.float32, copy=True)
    return gathered


def export_artifact(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    target: Path,
    spec: RunSpec,
    run_id: str,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Save the tuned model as a folder that is complete or not there; every rank calls it.

    Args:
        write_beside: writes what goes with the model, into the folder given; called on rank 0.
    """
    weights = gather_masters(model)
    if dist.get_rank() == 0:
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _save_weights(model, weights, part, base, spec)
        tokenizer.save_pretrained(part)
        if spec.export.merged and spec.tuning.type != "full":
            save_merged(base, part, part / MERGED_FOLDER, tokenizer)
        lineage = {"run": run_id, "tuning": spec.tuning.type, "base_model": str(base), "base_hash": hash_folder(base)}
        write_json(part / LINEAGE_FILE, lineage)
        if write_beside is not None:
            write_beside(part)
        part.rename(target)
    dist.barrier()


def _save_weights(model: Any, weights: dict[str, torch.Tensor], part: Path, base: Path, spec: RunSpec) -> None:
    """Only what moved, for adapters; for full tuning the whole model, with the buffers that a checkpoint holds."""
    if spec.tuning.type != "full":
        model.save_pretrained(part, state_dict=weights, safe_serialization=True)
        return
    dtype = _stored_dtype(base)
    kept = model.state_dict().keys()
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    model.save_pretrained(part, state_dict={name: value.to(dtype) for name, value in weights.items()} | buffers)
    # save_pretrained() writes the dtype of training into the config, and readers load in the dtype that it names.
    model.config.dtype = dtype
    model.config.save_pretrained(part)


def _stored_dtype(base: Path) -> torch.dtype:
    """The dtype that the base's weights are stored in, which the tuned model keeps."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(base).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def save_merged(base: Path, adapter: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fold an adapter into its base, in fp32, and save the whole model in the base's dtype."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_base(base, torch.float32), adapter).merge_and_unload()
    merged.to(_stored_dtype(base)).save_pretrained(target)
    tokenizer.save_pretrained(target)
