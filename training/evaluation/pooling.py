"""Runs of one spec that differ in their seed alone, pooled: mean, spread over seeds, and an interval over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.errors import Problem, TenureError, fail
from training.evaluation.comparison import protocol_problem
from training.evaluation.scorecard import Scorecard, SuiteScore
from training.evaluation.stats import pooled_interval


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PooledSuite(_Record):
    """A suite over seeds: `change` is the mean improvement over the base, `deviation` its standard deviation.

    The interval is over seeds and items (see training/evaluation/stats.py); `changes` are the seeds' own, in order.
    """

    name: str
    role: Literal["target", "retention"]
    metric: str
    unit: str
    base: float
    tuned: float
    change: float
    deviation: float
    interval: tuple[float, float]
    changes: tuple[float, ...]


class PooledSeeds(_Record):
    """Runs of one spec, their seeds, and every suite over them."""

    schema_version: Literal[1] = 1
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    suites: tuple[PooledSuite, ...]


def pool_seeds(cards: Sequence[Scorecard], specs: Sequence[dict[str, Any]]) -> PooledSeeds:
    """All suites over the runs' seeds.

    Args:
        specs: the runs' specs as they lie in their folders, in the order of the scorecards.

    Raises:
        TenureError: there are fewer than two, protocols or bases differ, two have one seed, or the specs differ in
            more than the seed; names what.
    """
    if len(cards) < 2:
        raise fail("one run has no spread over seeds", "tenure compare --seeds", "name two runs or more")
    first = cards[0]
    problems = [protocol_problem(first, card) for card in cards[1:] if card.protocol_hash != first.protocol_hash]
    problems += list(_differences(cards, specs))
    if problems:
        raise TenureError(problems)
    suites = tuple(_pooled([_named(card, suite.name) for card in cards]) for suite in first.suites)
    return PooledSeeds(runs=tuple(card.run for card in cards), seeds=tuple(map(_seed, specs)), suites=suites)


def _seed(spec: dict[str, Any]) -> int:
    return int(spec["training"]["seed"])


def _named(card: Scorecard, name: str) -> SuiteScore:
    return next(suite for suite in card.suites if suite.name == name)


def _differences(cards: Sequence[Scorecard], specs: Sequence[dict[str, Any]]) -> list[Problem]:
    """What keeps runs from being seeds of one spec. Where they ran, and what they are called, decides nothing."""
    problems = []
    seeds = [_seed(spec) for spec in specs]
    settings = [_flat({key: value for key, value in spec.items() if key not in ("name", "scaling")}) for spec in specs]
    for card, given in zip(cards[1:], settings[1:], strict=True):
        where = f"{cards[0].run} and {card.run}"
        keys = sorted(
            k for k in {**settings[0], **given} if settings[0].get(k) != given.get(k) and k != "training.seed"
        )
        if keys:
            what = f"they differ in more than the seed: {', '.join(keys)}"
            problems.append(
                Problem(what, where, "pool runs of one spec; tenure compare without --seeds sets them side by side")
            )
        if card.base_hash != cards[0].base_hash:
            problems.append(Problem("their bases differ", where, "pool runs of one base"))
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            twin = cards[seeds.index(seed)].run
            problems.append(
                Problem(f"both have the seed {seed}", f"{twin} and {cards[index].run}", "name each seed once")
            )
    return problems


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf by its place."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}


def _pooled(scores: Sequence[SuiteScore]) -> PooledSuite:
    first = scores[0]
    sign = 1 if first.higher_is_better else -1
    gains = np.array([[sign * (item.tuned_score - item.base_score) for item in score.items] for score in scores])
    weights = np.array([item.weight for item in first.items])
    changes = [score.change for score in scores]
    return PooledSuite(
        name=first.name,
        role=first.role,
        metric=first.metric,
        unit=first.unit,
        base=first.base,
        tuned=float(np.mean([score.tuned for score in scores])),
        change=float(np.mean(changes)),
        deviation=float(np.std(changes, ddof=1)),
        interval=pooled_interval(gains, weights),
        changes=tuple(changes),
    )
