"""What a scored model gained and kept, in two figures with intervals; and several seeds of one setting, pooled.

Gain: the mean change over the target suites that have the first one's unit. Retention of a suite that is scored as a
share: rho = min(1, (r - c) / (r_0 - c)), with r_0 the base's score and c the chance level; of a cross-entropy, the
base's perplexity over the tuned model's, exp(-rise), likewise at most 1. A sweep steers by the least over the retention
suites, for a contract is broken by one. Source: this project.

Intervals are those of the paired changes, taken through the same formula: the base's own score counts as known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sweeps.result import Measured, Suite
from training.errors import TenureError, fail
from training.evaluation.comparison import protocol_problem
from training.evaluation.contract import judge, state_of
from training.evaluation.overall import promises
from training.evaluation.scorecard import Promise, Scorecard, State, SuiteScore
from training.evaluation.stats import FEW_DISCORDANT, is_binary, pooled_interval, score_interval
from training.spec import Contract

Interval = tuple[float, float]
NOTHING_KEPT = "no retention suite has a base above chance, so that nothing shows what is forgotten"
GIVE_ANOTHER = "give a suite on which the base does well, or one of cross-entropy"


@dataclass(frozen=True)
class Measures:
    """A model's two figures, the contract's verdict on it, and the suites that they come from."""

    gain: Measured
    gain_unit: str
    retention: Measured
    retention_mean: Measured
    contract: State
    reasons: tuple[str, ...]
    suites: tuple[Suite, ...]


def measure(card: Scorecard) -> Measures:
    """The figures of one scored model.

    Raises:
        TenureError: there is no target suite, or no retention suite on which the base is above chance.
    """
    return _measures(card.suites, card.contract.verdict, card.contract.reasons, together=False)


def pool(cards: Sequence[Scorecard], contract: Contract) -> Measures:
    """The figures of one setting over the scorecards of its seeds, and the contract's verdict on their means.

    Raises:
        TenureError: as for measure(), or the scorecards are of different protocols.
    """
    first, *others = cards
    problems = [protocol_problem(first, card) for card in others if card.protocol_hash != first.protocol_hash]
    if problems:
        raise TenureError(problems)
    if not others:
        return measure(first)
    columns = zip(*(card.suites for card in cards), strict=True)
    suites = tuple(pooled_suite(list(scores), contract) for scores in columns)
    over_all = _pooled_promises(suites, cards, contract)
    state = judge(suites, contract, over_all).verdict
    return _measures(suites, state, tuple(_told(suites, over_all, len(cards))), together=True)


def pooled_suite(scores: Sequence[SuiteScore], contract: Contract) -> SuiteScore:
    """One suite over seeds: means of the tuned scores and of the change, the interval over seeds and items."""
    first = scores[0]
    sign = 1 if first.higher_is_better else -1
    tuned = np.array([[item.tuned_score for item in score.items] for score in scores])  # (seeds, items)
    gains = sign * (tuned - np.array([item.base_score for item in first.items]))
    interval = _pooled_interval(gains, np.array([item.weight for item in first.items]))
    change = float(np.mean([score.change for score in scores]))
    state = state_of(change, interval, first.threshold if first.role == "target" else -first.threshold, contract)
    means = zip(first.items, tuned.mean(axis=0), strict=True)
    return first.model_copy(
        update={
            "tuned": float(np.mean([score.tuned for score in scores])),
            "change": change,
            "interval": interval,
            "state": state,
            "kept": state == "kept",
            "items_to_decide": None,
            "items": tuple(item.model_copy(update={"tuned_score": float(mean)}) for item, mean in means),
        }
    )


def _pooled_interval(gains: np.ndarray, weights: np.ndarray) -> Interval:
    """The interval over seeds and items; where right and wrong changed on few items, at least the score interval.

    Args:
        gains: (seeds, items). weights: (items,).
    """
    low, high = pooled_interval(gains, weights)
    won, lost = (float((sign * gains > 0).sum(axis=1).mean()) for sign in (1, -1))
    if not is_binary(gains.ravel(), np.tile(weights, len(gains))) or won + lost >= FEW_DISCORDANT:
        return low, high
    least, most = score_interval(won, lost, gains.shape[1])  # type: ignore[arg-type]  # means of counts do as well
    return min(low, least), max(high, most)


def suite_retention(suite: SuiteScore) -> Measured | None:
    """min(1, r / r_0), chance-corrected, or the ratio of perplexities; None where the base is at chance."""
    found = [retention_at(suite, change) for change in (suite.change, *suite.interval)]
    value, low, high = (1.0 if one is None else min(1.0, one) for one in found)
    return None if None in found else _measured(value, low, high)


def retention_at(suite: SuiteScore, change: float) -> float | None:
    """What a change of the suite would be as retention, unclipped; None where the base is at chance."""
    if suite.unit.startswith("nats"):
        return math.exp(min(change, 0.0))
    above = suite.base - (suite.chance or 0.0)
    return 1 + change / above if above > 0 else None


def mean_of(parts: Sequence[Measured], together: bool) -> Measured:
    """The mean of figures. Suites hold different items, so the errors of one model on them are independent, and add
    up as squares; over the same seeds (`together`) they are not, and are taken to go all one way.
    """
    value = sum(part.value for part in parts) / len(parts)
    below = [part.value - part.low for part in parts]
    above = [part.high - part.value for part in parts]
    down, up = (sum(ends) if together else math.hypot(*ends) for ends in (below, above))
    return Measured(value=value, low=value - down / len(parts), high=value + up / len(parts))


def least_of(parts: Sequence[Measured]) -> Measured:
    """The least of figures: its interval goes from the lowest low end to the lowest high end."""
    lows, values, highs = ([getattr(part, end) for part in parts] for end in ("low", "value", "high"))
    return Measured(value=min(values), low=min(lows), high=min(highs))


def _measures(suites: Sequence[SuiteScore], state: State, reasons: tuple[str, ...], *, together: bool) -> Measures:
    targets = [suite for suite in suites if suite.role == "target"]
    if not targets:
        raise fail("there is no target suite to gain on", "suites.target", "give one: a sweep maximises its score")
    unit = targets[0].unit
    kept = [rho for rho in map(suite_retention, (s for s in suites if s.role == "retention")) if rho is not None]
    if not kept:
        raise fail(NOTHING_KEPT, "suites.retention", GIVE_ANOTHER)
    gains = [_measured(suite.change, *suite.interval) for suite in targets if suite.unit == unit]
    return Measures(
        gain=mean_of(gains, together),
        gain_unit=unit,
        retention=least_of(kept),
        retention_mean=mean_of(kept, together),
        contract=state,
        reasons=reasons,
        suites=tuple(map(_suite, suites)),
    )


def _suite(score: SuiteScore) -> Suite:
    return Suite(
        name=score.name,
        role=score.role,
        metric=score.metric,
        unit=score.unit,
        base=score.base,
        tuned=score.tuned,
        change=_measured(score.change, *score.interval),
        retention=suite_retention(score) if score.role == "retention" else None,
        bound=score.threshold if score.role == "target" else retention_at(score, -score.threshold),
        state=score.verdict,
    )


def _pooled_promises(
    suites: Sequence[SuiteScore], cards: Sequence[Scorecard], contract: Contract
) -> tuple[Promise, ...]:
    """The contract's promises over all retention suites, on the means over seeds."""
    values = {"min_retention": _ratios(suites), "max_mean_loss": _losses(suites)}
    # Which promises there are, and which suites count, is the same for every seed.
    return tuple(_pooled_promise(one, values[one.name], contract) for one in promises(cards[0].suites, contract))


def _pooled_promise(one: Promise, parts: list[Measured], contract: Contract) -> Promise:
    if not parts:
        return one
    mean = mean_of(parts, together=True)
    sign = 1 if one.name == "min_retention" else -1
    low, high = sorted((sign * mean.low, sign * mean.high))
    state = state_of(sign * mean.value, (low, high), sign * one.threshold, contract)
    return one.model_copy(update={"value": mean.value, "interval": (mean.low, mean.high), "state": state})


def _told(suites: Sequence[SuiteScore], over_all: Sequence[Promise], seeds: int) -> Iterator[str]:
    """A sentence for every promise that is broken or open over the seeds."""
    for suite in suites:
        if suite.verdict != "kept":
            low, high = suite.interval
            asked = (
                f"at least {suite.threshold:g}" if suite.role == "target" else f"a loss of at most {suite.threshold:g}"
            )
            yield (
                f"{suite.name} changed by {suite.change:+.4f} [{low:+.4f}, {high:+.4f}] ({suite.unit}) over {seeds} "
                f"seeds, and the contract asks for {asked}: {suite.verdict}"
            )
    for promise in over_all:
        if promise.state != "kept" and promise.value is not None:
            yield f"{promise.name} is {promise.value:.4f}, and {promise.threshold:g} was promised: {promise.state}"


def _ratios(suites: Sequence[SuiteScore]) -> list[Measured]:
    found = (suite_retention(suite) for suite in suites if suite.role == "retention" and suite.unit == "share")
    return [ratio for ratio in found if ratio is not None]


def _losses(suites: Sequence[SuiteScore]) -> list[Measured]:
    shares = (suite for suite in suites if suite.role == "retention" and suite.unit == "share")
    return [_measured(-suite.change, -suite.interval[1], -suite.interval[0]) for suite in shares]


def _measured(value: float, low: float, high: float) -> Measured:
    """An interval that was cut at 1, or resampled, may leave its estimate out by a hair: it is widened to it."""
    return Measured(value=value, low=min(low, value), high=max(high, value))
