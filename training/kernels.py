"""Fused kernels for what a model's layers do between their matrix products: norms, rotary positions, activations.

Two ways to them, never both: Liger's (arXiv 2410.10989), written for an architecture, and each layer compiled by torch.
Together they end in illegal memory accesses.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from training.errors import fail
from training.spec import Kernels


def use_kernels(model: Any, asked: Kernels, zero_stage: int) -> str:
    """Put fused kernels into a model as it was loaded; what was chosen: `liger`, `compile` or `none`.

    Raises:
        TenureError: those that were asked for cannot be had here.
    """
    chosen = choose(asked, _known_to_liger(model), torch.cuda.is_available())
    if chosen == "liger":
        _use_liger(model)
    elif chosen == "compile":
        compile_layers(model, zero_stage)
    return chosen


def choose(asked: Kernels, known_to_liger: bool, gpu: bool) -> str:
    """The kernels for a model: on a GPU `auto` is Liger's where it knows the architecture, and none elsewhere.

    Raises:
        TenureError: Liger's were asked for, and there is no GPU, no Liger, or no such architecture in it.
    """
    if asked == "auto":
        return "liger" if gpu and known_to_liger else "none"
    if asked == "liger" and not (gpu and known_to_liger):
        what = "Liger has no kernels for this architecture, or is not installed" if gpu else "Liger needs a GPU"
        raise fail(what, "training.kernels", "set it to auto, or pip install 'tenure[gpu]' for Liger's on a GPU")
    return asked


def _known_to_liger(model: Any) -> bool:
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return False
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    return model.config.model_type in known


def _use_liger(model: Any) -> None:
    """All but its losses: ours is fused with the output head already, and knows of weights of rows."""
    patch = importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def compile_layers(model: Any, zero_stage: int = 0) -> None:
    """Compile every layer by itself: alike, they share one compilation, and a caller sees the same modules as before.

    Raises:
        TenureError: weights come and go at ZeRO 3, or there is no list of layers.
    """
    if zero_stage == 3:
        what = "layers cannot be compiled at ZeRO 3, whose weights come and go between them"
        raise fail(what, "training.kernels", "set it to auto, liger or none")
    for layer in layers_of(model):
        layer.compile()


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The layers of a decoder: its longest list of modules of one kind.

    Raises:
        TenureError: it has none.
    """
    lists = [list(part) for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    alike = [part for part in lists if len({type(module) for module in part}) == 1]
    if not alike:
        raise fail(f"{type(model).__name__} has no list of layers", "training.kernels", "set it to none")
    return max(alike, key=len)
