"""What all retention suites come to together: retention, the general-ability delta, and the promises about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from training.evaluation.contract import state_of
from training.evaluation.scorecard import Forgetting, Promise, State, SuiteScore
from training.evaluation.stats import CONFIDENCE
from training.evaluation.transfer import Kept, general_ability_delta, retention
from training.spec import Contract

RESAMPLES = 2_000
OverAll = Literal["min_retention", "max_mean_loss"]


def summarise_forgetting(suites: Sequence[SuiteScore]) -> Forgetting:
    """The figures over all retention suites. A suite at chance is left out of retention, and named."""
    shares = [suite for suite in suites if suite.role == "retention" and suite.unit == "share"]
    kept, left_out = _with_something_to_keep(shares)
    return Forgetting(
        retention=retention(kept) if kept else None,
        retention_unclipped=retention(kept, clipped=False) if kept else None,
        general_ability_delta=general_ability_delta([s.base for s in shares], [s.tuned for s in shares])
        if shares
        else None,
        left_out=left_out,
        rise_in_nats={s.name: -s.change for s in suites if s.role == "retention" and s.unit.startswith("nats")},
    )


def promises(suites: Sequence[SuiteScore], contract: Contract) -> tuple[Promise, ...]:
    """The contract's promises over all retention suites, with intervals from resampling every suite's items."""
    shares = [suite for suite in suites if suite.role == "retention" and suite.unit == "share"]
    with_base = [suite for suite in shares if _kept(suite).base > _kept(suite).chance]
    found = []
    if contract.min_retention is not None:
        found.append(_promise("min_retention", contract.min_retention, with_base, _ratios, contract))
    if contract.max_mean_loss is not None:
        found.append(_promise("max_mean_loss", contract.max_mean_loss, shares, _losses, contract))
    return tuple(found)


def _promise(
    name: OverAll, threshold: float, suites: Sequence[SuiteScore], figure: Callable[..., np.ndarray], contract: Contract
) -> Promise:
    """A promise over suites; without any it is undecided, for nothing shows whether it is kept."""
    if not suites:
        return Promise(name=name, threshold=threshold, value=None, interval=None, state="undecided")
    means = np.stack([_resampled(suite, index) for index, suite in enumerate(suites)])
    chances = np.array([suite.chance or 0.0 for suite in suites])[:, None]
    values = figure(means[:, 0], means[:, 1], chances).mean(axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(end) for end in np.nanquantile(values[1:], [tail, 1 - tail]))
    sign = 1 if name == "min_retention" else -1
    ends = (low, high) if sign == 1 else (-high, -low)
    state: State = state_of(sign * float(values[0]), ends, sign * threshold, contract)
    return Promise(name=name, threshold=threshold, value=float(values[0]), interval=(low, high), state=state)


def _ratios(base: np.ndarray, tuned: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """min(1, r / r_0) per suite and draw, nan where a draw's base is not above chance."""
    before = base - chance
    ratios = np.divide(tuned - chance, before, out=np.full_like(before, np.nan), where=before > 0)
    return np.asarray(np.minimum(1.0, ratios))


def _losses(base: np.ndarray, tuned: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.asarray(base - tuned)


def _resampled(suite: SuiteScore, seed: int) -> np.ndarray:
    """The suite's means, (2, 1 + RESAMPLES): base and tuned, of all items first and then of each draw of items."""
    scores = np.array([(item.base_score, item.tuned_score) for item in suite.items])
    weights = np.array([item.weight for item in suite.items])
    count = len(scores)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    counts = np.vstack([np.ones(count), drawn]) * weights
    return np.asarray((counts @ scores / counts.sum(axis=1, keepdims=True)).T)


def _kept(suite: SuiteScore) -> Kept:
    return Kept(suite.name, suite.base, suite.tuned, suite.chance or 0.0)


def _with_something_to_keep(suites: Sequence[SuiteScore]) -> tuple[list[Kept], tuple[str, ...]]:
    """Suites on which the base is above chance, and the names of the others."""
    every = [_kept(suite) for suite in suites]
    return [kept for kept in every if kept.base > kept.chance], tuple(k.name for k in every if k.base <= k.chance)
