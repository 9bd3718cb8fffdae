"""What is known of PEFT's methods without loading PEFT, and the check of their options, which loads it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_type_hints

Method = Literal[
    "adaption_prompt",
    "beft",
    "boft",
    "c3a",
    "cartridge",
    "deft",
    "delora",
    "fourierft",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "lily",
    "ln_tuning",
    "loha",
    "lokr",
    "miss",
    "oft",
    "osf",
    "p_tuning",
    "peanut",
    "prefix_tuning",
    "prompt_tuning",
    "pvera",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
]

# With the base in another dtype, or on another machine, the basis comes out otherwise and the adapter means nothing.
_NOT_SAVED = "its basis is decomposed from the base anew at every load, and the adapter does not hold all of it"
REFUSED_METHODS: dict[str, str] = {
    "adalora": "it prunes ranks between steps and penalises its loss, both outside what DeepSpeed's masters keep",
    "adamss": _NOT_SAVED,
    "cpt": "its prompt is made of labelled examples, with a loss and a projection step of its own",
    "frod": _NOT_SAVED,
    "multitask_prompt_tuning": "it needs several tasks, and their numbers with every row",
    "poly": "it needs several tasks, and their numbers with every row",
    "psoft": _NOT_SAVED,
    "shadow": "its second network learns from a loss of its own, which PEFT computes from labels",
    "xlora": "it mixes adapters that were trained before",
}

# Soft prompts: virtual tokens or cached keys and values before every row.
PROMPT_METHODS = frozenset({"cartridge", "p_tuning", "prefix_tuning", "prompt_tuning"})
# What these add cannot be folded into the base's own weights.
UNMERGEABLE: dict[str, str] = {
    **dict.fromkeys(PROMPT_METHODS, "it adds a prompt, not weights"),
    "adaption_prompt": "it adds a prompt to attention, not weights",
    "beft": "it adds biases, for which most models' linear modules have no place",
    "lily": "it routes every token through experts of its own",
}

_SET_BY_TENURE: dict[str, str] = {
    "auto_mapping": "it is set from the model",
    "base_model_name_or_path": "it is the spec's model",
    "inference_mode": "it is set by training and reloading",
    "megatron_config": "models of Megatron are not supported",
    "megatron_core": "models of Megatron are not supported",
    "num_attention_heads": "it is read from the model",
    "num_layers": "it is read from the model",
    "num_transformer_submodules": "it is read from the model",
    "peft_type": "it is the tuning's type",
    "peft_version": "it is the installed one",
    "revision": "it belongs to the spec's model",
    "task_type": "it is always CAUSAL_LM",
    "token_dim": "it is read from the model",
    "tokenizer_name_or_path": "it is the spec's model",
}
_NEEDED: dict[str, tuple[str, ...]] = {"trainable_tokens": ("token_indices",)}

LORA_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
LORA_OPTIONS = (
    "alpha_pattern",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)
# What vLLM reads of an adapter beside rank, alpha and targets, or what decides only which tensors it holds.
_PLAIN_LORA = {"exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "use_rslora"}
_LORA_STARTS = ("gaussian", "olora", "orthogonal", "pissa")

Wrong = tuple[str, str, tuple[str | int, ...]]


def method_names() -> tuple[str, ...]:
    """Every usable method of PEFT beside LoRA, in order."""
    return Method.__args__  # type: ignore[attr-defined, no-any-return]


def wrong_option(method: str, options: Mapping[str, Any]) -> Wrong | None:
    """What is wrong with a PEFT method's options: what, what instead, and the key below tuning. Options load PEFT."""
    for name in _NEEDED.get(method, ()):
        if not options.get(name):
            return f"{method} needs the option {name}", f"set options: {{{name}: ...}}", ("options",)
    if not options:
        return None
    return _wrong_for(_config_class(method), options, method)


def wrong_lora_option(options: Mapping[str, Any]) -> Wrong | None:
    """The same for the further options of LoRA. Loads PEFT."""
    for name in options:
        if name in LORA_KEYS:
            key = LORA_KEYS[name]
            return f"{name} has a key of its own", f"set tuning.{key}", ("options", name)
    known = _config_class("lora").__dataclass_fields__
    for name in options:
        if name in known and name not in LORA_OPTIONS and name not in _SET_BY_TENURE:
            reason = "it needs data, another model, or a base that no server loads"
            return (
                f"LoRA's option {name} is not supported: {reason}",
                f"use one of {_list(LORA_OPTIONS)}",
                (
                    "options",
                    name,
                ),
            )
    start = options.get("init_lora_weights", True)
    if not isinstance(start, bool) and not _is_known_start(start):
        what = f"LoRA cannot start from {start!r} here"
        return what, f"use true, {_list(_LORA_STARTS)} or pissa_niter_N", ("options", "init_lora_weights")
    if changes_base(options) and ("rank_pattern" in options or "alpha_pattern" in options):
        what = f"{start} changes the base, and its adapter is turned into a plain one of twice the rank"
        return what, "remove rank_pattern and alpha_pattern", ("options",)
    if changes_base(options) and options.get("use_dora"):
        what = f"{start} changes the base, whose norms DoRA keeps"
        return what, "remove use_dora, or init_lora_weights", ("options", "use_dora")
    typed = {name: value for name, value in options.items() if name != "init_lora_weights"}
    return _wrong_for(_config_class("lora"), typed, "lora")


def _is_known_start(start: Any) -> bool:
    return start in _LORA_STARTS or (str(start).startswith("pissa_niter_") and str(start)[12:].isdigit())


def changes_base(options: Mapping[str, Any]) -> bool:
    """Whether LoRA starts by taking its first product out of the base's weights."""
    return str(options.get("init_lora_weights", True)).startswith(("pissa", "olora"))


def is_plain_lora(options: Mapping[str, Any]) -> bool:
    """Whether vLLM serves a LoRA adapter with these options as it is."""
    return set(options) <= _PLAIN_LORA


def _config_class(method: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method.upper()]]


def _wrong_for(config: Any, options: Mapping[str, Any], method: str) -> Wrong | None:
    """Options against the dataclass of their method: names, types, and what the class itself refuses."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in _SET_BY_TENURE]
    for name in options:
        if name in _SET_BY_TENURE:
            return f"Tenure sets {name} itself: {_SET_BY_TENURE[name]}", f"remove {name}", ("options", name)
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            known = f"known: {', '.join(sorted(names))}"
            return (
                f"{method} has no option '{name}'",
                f"did you mean '{close[0]}'? {known}" if close else known,
                ("options", name),
            )
    return _wrong_type(config, options) or _refused_by_peft(config, options, method)


def _wrong_type(config: Any, options: Mapping[str, Any]) -> Wrong | None:
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(config)
    for name, value in options.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            shown = str(hints[name]) if not isinstance(hints[name], type) else hints[name].__name__
            why = error.errors()[0]["msg"]
            what = f"{value!r} is no value for {name}: {why[0].lower()}{why[1:]}"
            return what, f"give {shown.replace('typing.', '')}", ("options", name)
    return None


def _refused_by_peft(config: Any, options: Mapping[str, Any], method: str) -> Wrong | None:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config(**options)
    except (TypeError, ValueError, ImportError) as error:
        return f"PEFT refuses these options of {method}: {error}", "change them as it says", ("options",)
    return None


def _list(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
