"""How sure a difference between two models is: intervals, tests and their correction over suites, each with its source.

Everything is paired: gains[i] is how much better the second model did on item i (positive is better), weights[i] the
item's weight in the suite's mean (bytes for a cross-entropy, otherwise 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Below so many pairs that changed, asymptotic intervals and tests are off (McNemar's textbook bound).
FEW_DISCORDANT = 25
Array = np.ndarray
Interval = tuple[float, float]
Method = Literal["bootstrap", "score", "none"]


def paired_interval(gains: Array, weights: Array, *, shares: bool = True) -> tuple[Interval, Method]:
    """The 95 % interval of a suite's change, and how it was made: "bootstrap", "score" or "none".

    Resampling knows nothing of what did not happen: where scores are right or wrong and few items changed, the score
    interval takes its place, which is not empty where nothing changed at all. One graded item has none.

    Args:
        shares: the scores are shares. Nats (False) are never right or wrong, even where none of them changed.
    """
    won, lost = discordant(gains)
    if shares and is_binary(gains, weights) and won + lost < FEW_DISCORDANT:
        return score_interval(won, lost, len(gains)), "score"
    if len(gains) == 1:
        return (float(gains[0]), float(gains[0])), "none"
    return bootstrap_interval(gains, weights), "bootstrap"


def bootstrap_interval(gains: Array, weights: Array, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The 95 % interval of a weighted mean of paired differences, by resampling items.

    Percentiles, taken a little farther out as Student's t is wider than the normal: plain ones cover too seldom on few
    items. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; the widening is that of
    Hesterberg, arXiv 1411.5279, section 4.3.3.
    """
    count = len(gains)
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    counts = counts.astype(float)  # floats multiply in BLAS, ten times as fast
    means = (counts @ (gains * weights)) / (counts @ weights)
    tail = _widened_tail(count)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=1024)
def _widened_tail(count: int) -> float:
    from scipy.stats import norm, t

    if count == 1:
        return 0.0
    return float(norm.cdf(math.sqrt(count / (count - 1)) * t.ppf((1 - CONFIDENCE) / 2, count - 1)))


def score_interval(won: int, lost: int, count: int) -> Interval:
    """The 95 % score interval of (won - lost) / count, for items that are right or wrong.

    Source: Tango, Statistics in Medicine 17, 1998, pages 891 to 908.
    """
    from scipy.optimize import brentq

    z = _z()
    estimate = (won - lost) / count
    low, high = -1.0, 1.0
    if _score(won, lost, count, low) > z:
        low = brentq(lambda delta: _score(won, lost, count, delta) - z, -1.0, estimate)
    if _score(won, lost, count, high) < -z:
        high = brentq(lambda delta: _score(won, lost, count, delta) + z, estimate, 1.0)
    return float(low), float(high)


def _score(won: int, lost: int, count: int, delta: float) -> float:
    """Tango's statistic: how many standard errors (under that difference) the data lie above a true one of delta."""
    b = -won - lost + (2 * count - won + lost) * delta
    c = -lost * delta * (1 - delta)
    share_lost = (math.sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
    variance = count * (2 * share_lost + delta * (1 - delta))
    distance = won - lost - count * delta
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def pooled_interval(gains: Array, weights: Array) -> Interval:
    """The 95 % interval of the mean change over several seeds, scored on the same items.

    Items are not independent between seeds and seeds are few, so neither all (seed, item) pairs nor seeds alone may be
    resampled: the variance of seeds, of items and of both together add up, with Satterthwaite's degrees of freedom.
    One seed speaks for itself alone: that is the interval over items.

    Args:
        gains: (seeds, items). weights: (items,).

    Source: Satterthwaite, Biometrics Bulletin 2, 1946; crossed resampling: Owen, arXiv math/0702386.
    """
    from scipy.stats import t

    seeds, items = gains.shape
    if seeds == 1:
        return bootstrap_interval(gains[0], weights)
    shares = weights / weights.sum()
    by_seed, by_item = gains @ shares, gains.mean(axis=0)
    mean = float(by_seed.mean())
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_items = float((shares**2 * (by_item - mean) ** 2).sum()) * items / (items - 1)
    rest = gains - by_seed[:, None] - by_item[None, :] + mean
    of_both = float((shares**2 * rest**2).sum()) / (seeds * (seeds - 1)) * items / (items - 1)
    variance = max(of_seeds + of_items - of_both, of_seeds, of_items)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_items**2 / (items - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return mean - half, mean + half


def p_value(gains: Array, weights: Array) -> float:
    """How likely a change at least this far from none is, were none true: McNemar for right and wrong, else signs."""
    return mcnemar(*discordant(gains)) if is_binary(gains, weights) else sign_flip(gains, weights)


def mcnemar(won: int, lost: int) -> float:
    """McNemar's two-sided p-value: exact (binomial) below 25 changed pairs, else chi-squared with Edwards' correction.

    Source: McNemar, Psychometrika 12, 1947; Edwards, Psychometrika 13, 1948.
    """
    from scipy.stats import binomtest, chi2

    changed = won + lost
    if changed == 0:
        return 1.0
    if changed < FEW_DISCORDANT:
        return float(binomtest(won, changed, 0.5).pvalue)
    return float(chi2.sf(max(0, abs(won - lost) - 1) ** 2 / changed, 1))


def sign_flip(gains: Array, weights: Array, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """The two-sided p-value of a weighted mean, by flipping the items' signs at random.

    Source: Fisher's randomisation test; counted as (1 + hits) / (1 + draws), Phipson and Smyth, arXiv 1603.05766.
    """
    sums = gains * weights
    observed = abs(float(sums.sum()))
    if observed == 0 and not sums.any():
        return 1.0
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(resamples, len(sums)))
    hits = int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    return (1 + hits) / (1 + resamples)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p-values: below 0.05 for all of them, no true null is rejected with a chance of 95 %.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def discordant(gains: Array) -> tuple[int, int]:
    """How many items got better, and how many worse."""
    return int((gains > 0).sum()), int((gains < 0).sum())


def is_binary(gains: Array, weights: Array) -> bool:
    """Whether the items were right or wrong, all of one weight."""
    return bool(np.isin(gains, (-1.0, 0.0, 1.0)).all() and (weights == weights[0]).all())


def items_to_decide(change: float, end: float, least: float, count: int) -> int | None:
    """How many items it would take for an interval of this shape to leave the threshold out; None when no number does.

    An interval narrows with the square root of the number of items. Source: this project.

    Args:
        end: the end of the interval that lies on the threshold's side. least: the threshold, as a change.
    """
    distance, half = abs(change - least), abs(end - change)
    if distance < 1e-12:
        return None
    return max(count + 1, math.ceil(count * (half / distance) ** 2))


def items_to_see(threshold: float, deviation: float, power: float = 0.8) -> int | None:
    """Items for a paired test at 5 % to see a change as large as the threshold with this power; None for threshold 0.

    n = ((z_0.975 + z_power) x deviation / threshold)^2, with the standard deviation of the paired differences.
    Source: Cohen, Statistical Power Analysis, 1988, chapter 2.
    """
    from scipy.stats import norm

    if threshold <= 0:
        return None
    return max(2, math.ceil(((_z() + float(norm.ppf(power))) * deviation / threshold) ** 2))


@lru_cache(maxsize=1)
def _z() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + CONFIDENCE) / 2))
