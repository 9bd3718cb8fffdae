"""Writes the artifact of a run: safetensors with tokenizer, chat template and generation config."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from training.errors import fail
from training.models import hash_folder
from training.one_worker import MASTER
from training.spec import RunSpec
from training.strategy import is_adapter, merges_by_itself
from training.tuning import ADAPTER, load_base
from training.workspace import LINEAGE_FILE, MERGED_FOLDER, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def gather_masters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole fp32 masters of all parameters that move, by name, on rank 0 (elsewhere empty). All ranks call it.

    Raises:
        TenureError: a gathered tensor does not have its parameter's shape.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = vars(parameter).get(MASTER, safe_get_full_fp32_param(parameter))
            full = parameter.detach() if full is None else full
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(full.shape) != shape:
                raise fail(f"'{name}' was gathered as {tuple(full.shape)}, not {shape}", "export", "report this")
            if dist.get_rank() == 0:
                gathered[name] = full.detach().to("cpu", torch.float32, copy=True)
    return gathered


def gather_frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter holds without moving it, by name, on rank 0 (elsewhere empty). All ranks call it."""
    from deepspeed.runtime.zero import GatheredParameters

    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and f".{ADAPTER}." in f"{name}.":
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if dist.get_rank() == 0:
                    gathered[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return gathered


def export_artifact(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    target: Path,
    spec: RunSpec,
    run_id: str,
    initial: dict[str, torch.Tensor] | None = None,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Save the tuned model as a folder that is complete or not there; every rank calls it.

    Args:
        initial: LoRA's first A and B by parameter name, where they were taken out of the base.
        write_beside: writes what goes with the model, into the folder given; called on rank 0.
    """
    weights = gather_masters(model) | gather_frozen(model)
    if dist.get_rank() == 0:
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if is_adapter(spec.tuning):
            _save_adapter(model, weights, part, initial or {})
        else:
            _save_whole(model, weights, part, base)
        tokenizer.save_pretrained(part)
        if is_adapter(spec.tuning) and (spec.export.merged or merges_by_itself(spec.tuning)):
            save_merged(base, part, part / MERGED_FOLDER, tokenizer)
        lineage = {"run": run_id, "tuning": spec.tuning.type, "base_model": str(base), "base_hash": hash_folder(base)}
        for folder in (part, part / MERGED_FOLDER):
            if folder.is_dir():
                write_json(folder / LINEAGE_FILE, lineage)
        if write_beside is not None:
            write_beside(part)
        part.rename(target)
    dist.barrier()


def _save_whole(model: Any, weights: dict[str, torch.Tensor], part: Path, base: Path) -> None:
    """The whole model in the base's dtype, with its buffers. What did not move is read from the base again."""
    dtype = _stored_dtype(base)
    names = [name for name, _ in model.named_parameters()]
    if len(weights) < len(names):
        weights = dict(load_base(base, dtype).named_parameters()) | weights
    kept = model.state_dict().keys()
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    state = {name: weights[name].detach().to(dtype) for name in names}
    model.save_pretrained(part, state_dict=state | buffers)
    # save_pretrained() writes the dtype of training into the config, and readers load in the dtype that it names.
    model.config.dtype = dtype
    model.config.save_pretrained(part)


def _save_adapter(model: Any, weights: dict[str, torch.Tensor], part: Path, initial: dict[str, torch.Tensor]) -> None:
    """An adapter that PEFT loads on the untouched base."""
    config = model.peft_config[ADAPTER]
    if config.is_prompt_learning:
        _save_prompt(model, weights, part)
        return
    kept = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    state = {name: buffer.detach().cpu() for name, buffer in buffers if name in kept}
    state |= _under_all_names(model, weights)
    if initial:
        state = {name: _with_initial(name, tensor, initial) for name, tensor in state.items()}
        model.peft_config[ADAPTER] = _of_twice_the_rank(config)
    model.save_pretrained(part, state_dict=state, safe_serialization=True)
    model.peft_config[ADAPTER] = config


def _under_all_names(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those that modules share under each of their names, as in a state dict."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = ((name, first[parameter]) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: weights[owner] for name, owner in every if owner in weights}


def _with_initial(name: str, tensor: torch.Tensor, initial: dict[str, torch.Tensor]) -> torch.Tensor:
    """A or B of the product BA - B0 A0, of twice the rank, which is right on the base before A0 and B0 were taken out.

    Source: PiSSA, arXiv 2404.02948, appendix C.
    """
    if name not in initial:
        return tensor
    return torch.cat([tensor, initial[name]], 0) if ".lora_A." in name else torch.cat([tensor, -initial[name]], 1)


def _of_twice_the_rank(config: Any) -> Any:
    """The config of a plain LoRA of twice the rank and the same scaling."""
    plain = copy.deepcopy(config)
    plain.r, plain.init_lora_weights = 2 * config.r, True
    plain.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    return plain


def _save_prompt(model: Any, weights: dict[str, torch.Tensor], part: Path) -> None:
    """A soft prompt, from a fresh encoder: PEFT reads the prompt off its own, whose weights may be shards."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config, trained = model.peft_config[ADAPTER], model.prompt_encoder
    settings = copy.deepcopy(config)
    if hasattr(settings, "prompt_tuning_init"):
        settings.prompt_tuning_init = "RANDOM"
    encoder = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    fresh = encoder(settings, None) if config.peft_type == "PROMPT_TUNING" else encoder(settings)
    prefix = f"prompt_encoder.{ADAPTER}."
    fresh.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    model.prompt_encoder = torch.nn.ModuleDict({ADAPTER: fresh})
    model.save_pretrained(part, safe_serialization=True)
    model.prompt_encoder = trained


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
