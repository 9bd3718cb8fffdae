"""Which training rows and target tokens count for how much, by what the base model thinks of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.data.prepare import Prepared
from training.data.store import MaskedRows, targets_of
from training.errors import fail
from training.objective.signals import Signals
from training.spec import RunSpec
from training.strategy import Flow, Stm


@dataclass(frozen=True)
class Weighed:
    """The data with the targets that are learned, and the weights of their rows.

    Attributes:
        weights: one for every sequence, or None where all count alike.
        kept: (targets of all sequences,) which targets are learned, or None for all.
    """

    data: Prepared
    weights: tuple[float, ...] | None = None
    kept: torch.Tensor | None = None


def weigh(data: Prepared, spec: RunSpec, aids: dict[str, str]) -> Weighed:
    """Apply the protections that weigh rows (flow) and mask targets (stm) to the training rows.

    Raises:
        TenureError: nothing is left to learn, or the weights have no scale.
    """
    weighed = Weighed(data)
    for protection in spec.protections:
        if isinstance(protection, Flow):
            weighed = replace(weighed, weights=flow_weights(data, Signals(Path(aids["signals"])), protection))
        if isinstance(protection, Stm):
            kept = stm_kept(data, Signals(Path(aids["signals"])), protection)
            weighed = replace(weighed, data=masked(data, kept), kept=kept)
    return weighed


def flow_weights(data: Prepared, signals: Signals, flow: Flow) -> tuple[float, ...]:
    """exp(-loss/temperature) for every training row by the base's mean loss on it; 1 for all other sequences."""
    losses = torch.stack([-signals.row_log_probs(index).mean() for index in range(len(data.train))]).double()
    temperature = _median(losses) if flow.temperature == "median" else flow.temperature
    if temperature <= 0:
        what = "the base's median loss on the training rows is 0, which weighs nothing"
        raise fail(what, "protections", "set flow.temperature to a number, or remove flow: the base knows these rows")
    weights = [math.exp(-loss / temperature) for loss in losses.tolist()]
    if not any(weights):
        what = f"every row's weight exp(-loss/{temperature:g}) is 0: nothing is left to learn"
        raise fail(what, "protections", f"set flow.temperature near {_median(losses):.3g}, the median loss, or median")
    others = len(data.sequences) - len(data.train)
    return (*weights, *(1.0,) * others)


def _median(values: torch.Tensor) -> float:
    """The median; of an even number, the mean of the middle two."""
    return float(values.quantile(0.5))


def stm_kept(data: Prepared, signals: Signals, stm: Stm) -> torch.Tensor:
    """(targets of all sequences,) whether each is learned: those of other sequences than training rows all are.

    Raises:
        TenureError: no training row has a target left.
    """
    kept = signals.log_probs >= -math.log(stm.threshold)
    num_train_targets = int(targets_of(data.train).sum())
    kept[num_train_targets:] = True
    if not kept[:num_train_targets].any():
        surest = math.exp(-float(signals.log_probs[:num_train_targets].max()))
        what = f"every target token has a perplexity above {stm.threshold:g} under the base: nothing is left to learn"
        raise fail(what, "protections", f"set stm.threshold well above {surest:.3g}, the lowest one, or remove stm")
    return kept


def masked(data: Prepared, kept: torch.Tensor) -> Prepared:
    """The data with those targets alone that are kept (targets of all sequences,)."""
    return replace(data, train=MaskedRows(data.train, kept[: int(targets_of(data.train).sum())].numpy()))


def describe(before: Prepared, weighed: Weighed) -> str:
    """What was masked, in words; empty when nothing was."""
    if weighed.kept is None:
        return ""
    targets = [int(targets_of(data.train).sum()) for data in (before, weighed.data)]
    empty = int((targets_of(weighed.data.train) == 0).sum())
    text = f"stm masks {targets[0] - targets[1]:,} of {targets[0]:,} target tokens"
    return text + (f"; {empty:,} of {len(before.train):,} rows have none left" if empty else "")
