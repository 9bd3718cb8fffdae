"""Attention that stays inside each of several examples laid end to end: no padding, no mask, nothing wasted."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import AttentionInterface

_NAME = "tenure_examples"
# What these models do to attention scores is not in the kernels used here.
_UNKNOWN = {"attn_logit_softcapping": "caps its attention scores", "attention_chunk_size": "attends in chunks"}
_LARGEST_HEAD = 256


def attend_within(model: PreTrainedModel) -> None:
    """Make a model keep attention within examples that collate() has laid end to end; it takes no other batches."""
    AttentionInterface.register(_NAME, _attend)
    model.set_attn_implementation(_NAME)


@contextmanager
def attend_as_before(model: Any) -> Iterator[None]:
    """Meanwhile attention as a model came with it, for padded batches; nothing where attend_within() has not been."""
    within = model.config._attn_implementation == _NAME
    if within:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if within:
            model.set_attn_implementation(_NAME)


def refusal(folder: Path) -> str | None:
    """Why a model's examples cannot stand side by side, from its config alone; None where they can."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if architecture is None or not architecture._can_set_attn_implementation():
        return f"{type(config).__name__} has an attention of its own"
    text = config.get_text_config()
    for key, what in _UNKNOWN.items():
        if getattr(text, key, None):
            return f"{type(config).__name__} {what}"
    return None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention (1, tokens, heads, size) of queries (1, heads, tokens, size); see transformers' AttentionInterface."""
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention dropout, caps and sinks are not known where examples stand side by side")
    if query.is_cuda and query.element_size() == 2 and query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD:
        return _by_kernel(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    return _by_example(query, key, value, scaling, sliding_window, cu_seq_lens_q), None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    bounds: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Flash attention over all examples in one call."""
    from torch.nn.attention.varlen import varlen_attn

    if longest * (len(bounds) - 1) == query.shape[2] and (window is None or window >= longest):
        return _by_row(query, key, value, scaling, longest)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _knows_groups():
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    seen = (-1 if window is None else window - 1, 0)
    grouped: dict[str, Any] = {"enable_gqa": True} if groups > 1 and _knows_groups() else {}
    found = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=seen, **grouped)
    assert isinstance(found, torch.Tensor)
    return found.unsqueeze(0)


def _by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, length: int
) -> torch.Tensor:
    """Examples of one length are rows of a batch, for which cuDNN has the fastest kernel where it has one."""
    size = query.shape[-1]
    query, key, value = (
        tensor[0].reshape(tensor.shape[1], -1, length, size).transpose(0, 1) for tensor in (query, key, value)
    )
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        found = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return found.transpose(1, 2).flatten(0, 1).unsqueeze(0)


@lru_cache(maxsize=1)
def _knows_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _by_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    bounds: torch.Tensor,
) -> torch.Tensor:
    """One call for each example: for processors and for 32 bits, which the kernel does not know."""
    edges = bounds.tolist()
    parts = []
    for start, end in itertools.pairwise(edges):
        mask = _band(end - start, window, query.device) if window is not None and end - start > window else None
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of the positions before it each position sees (length, length): itself and the window - 1 before."""
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)
