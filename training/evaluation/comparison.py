"""Two or more runs side by side: each suite's tuned scores, paired item by item against the first run's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.errors import Problem, TenureError, fail
from training.evaluation.scorecard import Item, Scorecard, SuiteScore
from training.evaluation.stats import discordant, holm, p_value, paired_interval


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChangedItem(_Record):
    """An item on which two runs did not do equally well, with both answers."""

    index: int
    prompt: str
    expected: str
    first_answer: str
    second_answer: str
    first_score: float
    second_score: float


class SuiteDifference(_Record):
    """How much better the second run's model does on a suite than the first's (positive is better), with its interval.

    `p_holm` is corrected over the suites of this pair; `lost` and `won` are the items on which the second did worse,
    and better. A suite that one of the runs lacks is named in the pair's `missing` instead.
    """

    name: str
    role: Literal["target", "retention"]
    metric: str
    unit: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    interval_method: Literal["bootstrap", "score", "none"]
    p_value: float
    p_holm: float
    lost: tuple[ChangedItem, ...]
    won: tuple[ChangedItem, ...]


class Pair(_Record):
    """The first run against another. `kl_to_base` are both runs' nats per token, by the role of the prompts."""

    first: str
    second: str
    same_base: bool
    suites: tuple[SuiteDifference, ...]
    missing: tuple[str, ...]
    kl_to_base: dict[Literal["target", "retention"], tuple[float, float]] = {}


class Comparison(_Record):
    """Runs under one protocol: every other one against the first."""

    schema_version: Literal[1] = 1
    runs: tuple[str, ...]
    protocol_hash: str
    pairs: tuple[Pair, ...]


def compare_runs(cards: Sequence[Scorecard]) -> Comparison:
    """Every other run against the first, suite by suite.

    Raises:
        TenureError: there are fewer than two, or they were scored under different protocols; names what differs.
    """
    if len(cards) < 2:
        raise fail("one run alone compares with nothing", "tenure compare", "name two runs or more")
    first, *others = cards
    problems = [protocol_problem(first, other) for other in others if other.protocol_hash != first.protocol_hash]
    if problems:
        raise TenureError(problems)
    pairs = tuple(_pair(first, other) for other in others)
    return Comparison(runs=tuple(card.run for card in cards), protocol_hash=first.protocol_hash, pairs=pairs)


def _pair(first: Scorecard, second: Scorecard) -> Pair:
    ours, theirs = ({suite.name: suite for suite in card.suites} for card in (first, second))
    shared = [_difference(suite, theirs[name]) for name, suite in ours.items() if name in theirs]
    adjusted = holm([suite.p_value for suite in shared])
    return Pair(
        first=first.run,
        second=second.run,
        same_base=first.base_hash == second.base_hash,
        suites=tuple(s.model_copy(update={"p_holm": p}) for s, p in zip(shared, adjusted, strict=True)),
        missing=tuple(sorted(ours.keys() ^ theirs.keys())),
        kl_to_base={
            role: (kl.nats, second.kl_to_base[role].nats)
            for role, kl in first.kl_to_base.items()
            if role in second.kl_to_base
        },
    )


def _difference(first: SuiteScore, second: SuiteScore) -> SuiteDifference:
    sign = 1 if first.higher_is_better else -1
    pairs = list(zip(first.items, second.items, strict=True))
    gains = np.array([sign * (theirs.tuned_score - ours.tuned_score) for ours, theirs in pairs])
    weights = np.array([item.weight for item in first.items])
    interval, method = paired_interval(gains, weights, shares=first.unit == "share")
    changed = [(gain, _changed(*pair)) for gain, pair in zip(gains, pairs, strict=True)]
    assert discordant(gains) == (sum(g > 0 for g, _ in changed), sum(g < 0 for g, _ in changed))
    return SuiteDifference(
        name=first.name,
        role=first.role,
        metric=first.metric,
        unit=first.unit,
        first=first.tuned,
        second=second.tuned,
        difference=float(np.average(gains, weights=weights)),
        interval=interval,
        interval_method=method,
        p_value=p_value(gains, weights),
        p_holm=1.0,
        lost=tuple(item for gain, item in sorted(changed, key=_worst_first) if gain < 0),
        won=tuple(item for gain, item in sorted(changed, key=_best_first) if gain > 0),
    )


def _worst_first(entry: tuple[float, ChangedItem]) -> tuple[float, int]:
    return entry[0], entry[1].index


def _best_first(entry: tuple[float, ChangedItem]) -> tuple[float, int]:
    return -entry[0], entry[1].index


def _changed(ours: Item, theirs: Item) -> ChangedItem:
    return ChangedItem(
        index=ours.index,
        prompt=ours.prompt,
        expected=ours.expected,
        first_answer=ours.tuned_answer,
        second_answer=theirs.tuned_answer,
        first_score=ours.tuned_score,
        second_score=theirs.tuned_score,
    )


def protocol_problem(a: Scorecard, b: Scorecard) -> Problem:
    """What differs between the protocols of two runs."""
    keys = [key for key in {**a.protocol, **b.protocol} if _setting(a, key) != _setting(b, key)]
    changes = [f"{key} is {_setting(a, key)} in {a.run} and {_setting(b, key)} in {b.run}" for key in keys]
    # The hash also covers what the listed settings do not spell out, such as the items.
    what = "; ".join(changes) or "the settings agree, but the hashed items or templates do not"
    return Problem(
        what=f"{a.run} and {b.run} were scored under different protocols: {what}",
        instead="score both runs under one protocol, with the same suites and settings",
    )


def _setting(scorecard: Scorecard, key: str) -> str:
    return repr(scorecard.protocol[key]) if key in scorecard.protocol else "not set"
