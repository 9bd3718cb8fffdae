"""Which parameters move: all, some, or those of an adapter, applied to a loaded model."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.errors import Problem, fail, raise_all
from training.peft_methods import PROMPT_METHODS, changes_base
from training.strategy import AnyTuning, Full, Lora, Partial, Peft

ADAPTER = "default"
# These choose their modules by the model's architecture, or by options of their own.
_OWN_TARGETS = frozenset({"adaption_prompt", "ia3", "ln_tuning", "trainable_tokens"})
# It looks at the base's weights for places of its own.
_READ_WEIGHTS = frozenset({"shira"})
_BUFFERS_LIKE_WEIGHTS = frozenset({"delora", "pvera", "tinylora", "unilora", "vera"})
_NUM_VIRTUAL_TOKENS = 16
# The largest block that C3A and VB-LoRA cut weights into, as in their papers.
_LARGEST_BLOCK = 256


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model on the CPU. Remote code is never run and only safetensors are read."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model


def load_base_for(tuning: AnyTuning, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model as the tuning wants it: on this worker's GPU in nf4 for `bits: 4`, else as load_base()."""
    if not (isinstance(tuning, Lora) and tuning.bits):
        return load_base(folder, dtype)
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=quantised,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    )
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared


def empty_base(folder: Path) -> PreTrainedModel:
    """The base model without memory for its weights, on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def apply_tuning(model: torch.nn.Module, tuning: AnyTuning) -> torch.nn.Module:
    """The model with exactly those parameters requiring gradients that the tuning moves.

    Raises:
        TenureError: a pattern matches no parameter, or PEFT cannot put the method on this model.
    """
    if isinstance(tuning, Full):
        model.requires_grad_(True)
        return model
    if isinstance(tuning, Partial):
        moving = matching(tuning.parameters, [name for name, _ in model.named_parameters()])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in moving)
        return model
    from peft import get_peft_model

    try:
        adapted: torch.nn.Module = get_peft_model(model, peft_config(tuning, model))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        what = f"PEFT cannot put {tuning.type} on {type(model).__name__}: {error}"
        raise fail(what, "tuning", "use another tuning (lora goes with most models), or set options") from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        what = f"{tuning.type} finds nothing to move in {type(model).__name__}"
        raise fail(what, "tuning", "use another tuning (lora goes with most models), or set options.target_modules")
    return adapted


def recompute(model: Any, zero_stage: int) -> None:
    """Let a model's layers keep their inputs alone, and run each again for its backward pass.

    At ZeRO 3, which takes weights away between the passes, by torch's re-entrant kind: the other one finds them of
    another shape when it runs a layer again. That kind needs inputs with gradients, which those of an adapter's base
    have not.

    Raises:
        TenureError: the model's layers cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        what = f"{type(model).__name__} cannot run its layers again for the backward pass"
        raise fail(what, "training.gradient_checkpointing", "set it to false")
    sharded = zero_stage == 3
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": sharded})
    model.config.use_cache = False
    if sharded:
        model.enable_input_require_grads()


def count_moving(tuning: AnyTuning, folder: Path) -> int:
    """How many parameters a tuning moves; the base's weights are read only where a method looks at them."""
    if isinstance(tuning, Lora):  # what its first values are does not change how many there are
        kept = {name: value for name, value in tuning.options.items() if name != "init_lora_weights"}
        tuning = tuning.model_copy(update={"options": kept})
    base = load_base(folder, torch.float32) if tuning.type in _READ_WEIGHTS else empty_base(folder)
    model = apply_tuning(base, tuning)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that any of the patterns matches.

    Raises:
        TenureError: a pattern matches none; its nearest names are told.
    """
    found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    raise_all(
        Problem(f"'{pattern}' matches no parameter", "tuning.parameters", _nearest(pattern, names))
        for pattern, matched in found.items()
        if not matched
    )
    return {name for matched in found.values() for name in matched}


def _nearest(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"the nearest are {', '.join(close)}"


def peft_config(tuning: Lora | Peft, model: torch.nn.Module) -> Any:
    """PEFT's configuration of a tuning: its options over what suits the model."""
    if isinstance(tuning, Lora):
        return _lora_config(tuning, model)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[tuning.type.upper()]]
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in config.__dataclass_fields__ and tuning.type not in _OWN_TARGETS:
        settings["target_modules"] = _all_linear(tuning.options, model)
    settings |= _fitting(tuning, model) | tuning.options
    if tuning.type == "prompt_tuning":
        settings["tokenizer_name_or_path"] = model.name_or_path
    return config(**settings)


def _all_linear(options: dict[str, Any], model: torch.nn.Module) -> str | list[str]:
    """What names every linear module to PEFT, which takes its own word for that only where all layers are meant."""
    if options.get("layers_to_transform") is None:
        return "all-linear"
    return sorted({name.rpartition(".")[2] for name, _ in _linear_modules(model)})


def _lora_config(tuning: Lora, model: torch.nn.Module) -> Any:
    from peft import LoraConfig

    given = tuning.target_modules
    targets = _all_linear(tuning.options, model) if given == "all-linear" else list(given)
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=int(tuning.alpha) if float(tuning.alpha).is_integer() else tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **tuning.options,
    )


def _fitting(tuning: Peft, model: torch.nn.Module) -> dict[str, Any]:
    """Settings without which a method does not fit the model, or any."""
    if tuning.type in PROMPT_METHODS:
        prompt: dict[str, Any] = {"num_virtual_tokens": _NUM_VIRTUAL_TOKENS}
        if tuning.type in ("p_tuning", "prefix_tuning"):
            prompt["encoder_hidden_size"] = _text_config(model).hidden_size
        return prompt
    if tuning.type == "adaption_prompt":
        return {"adapter_len": _NUM_VIRTUAL_TOKENS, "adapter_layers": _text_config(model).num_hidden_layers}
    if tuning.type in ("c3a", "vblora"):
        name = "block_size" if tuning.type == "c3a" else "vector_length"
        return {name: _common_block(width for _, module in _linear_modules(model) for width in module.weight.shape)}
    return {}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _linear_modules(model: Any) -> list[tuple[str, Any]]:
    """The linear modules that `all-linear` means, by name: all but the output head."""
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear, Conv1D)
    return [(name, part) for name, part in model.named_modules() if isinstance(part, kinds) and part is not head]


def _common_block(widths: Iterable[int]) -> int:
    """The largest block, up to a bound, that divides every width."""
    common = math.gcd(*widths)
    return next((size for size in range(_LARGEST_BLOCK, 0, -1) if common % size == 0), 1)


def settle_buffers(model: torch.nn.Module, tuning: AnyTuning, dtype: torch.dtype) -> None:
    """The first worker's buffers on every worker, in a dtype that goes with the engine's weights.

    An adapter's may come from an SVD, whose signs are the machine's. DeepSpeed leaves buffers in fp32 (rotary
    frequencies need it), which some methods multiply with weights in bf16.
    """
    for name, buffer in model.named_buffers():
        if tuning.type in _BUFFERS_LIKE_WEIGHTS and f".{ADAPTER}." in f"{name}." and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
        whole = buffer.contiguous()
        dist.broadcast(whole, src=0)
        buffer.copy_(whole)


def initial_products(model: torch.nn.Module, tuning: AnyTuning) -> dict[str, torch.Tensor]:
    """LoRA's first A and B by parameter name, on the CPU, where they were taken out of the base; else nothing."""
    if not (isinstance(tuning, Lora) and changes_base(tuning.options)):
        return {}
    named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: parameter.detach().float().cpu().clone() for name, parameter in named if ".lora_" in name}
