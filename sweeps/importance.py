"""Which dimension of a sweep's space mattered: how much of the variance over trials each one explains alone.

fANOVA: a forest is fitted to the trials, and the variance of its marginal over one dimension is divided by the whole
variance. Source: Hutter, Hoos and Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML
2014; computed by Optuna. What a forest would find in the same trials with their outcomes shuffled is told beside it:
a dimension that explains no more than that is not told from chance.

Dimensions are conditional on strategies. Over all strategies the strategy is a dimension itself, beside those that all
of them have; a strategy's own ones are weighed among its trials alone. Numbers count by their place in the range that
their strategy was given (learning rates of adapters and of full tuning have ranges of their own).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sweeps.result import Dimension, Scalar, SweepResult, Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Measure = Literal["gain", "retention"]
STRATEGY = "strategy"
MIN_TRIALS, MIN_TRIALS_PER_DIMENSION = 12, 4
_SHUFFLES, _TREES, _SHUFFLED_TREES = 19, 64, 16


@dataclass(frozen=True)
class Share:
    """A dimension's share of the variance, from 0 to 1, and the most that shuffled outcomes gave it (95 %)."""

    path: str
    share: float
    chance: float

    @property
    def matters(self) -> bool:
        return self.share > self.chance


@dataclass(frozen=True)
class Importance:
    """The shares of one measure over all strategies or within one, largest first; or why they cannot be told.

    The trials are those that were measured at `rung`, those that were stopped there included.
    """

    measure: Measure
    strategy: str | None
    num_trials: int
    rung: int
    shares: tuple[Share, ...]
    refused: str | None = None


def importances(result: SweepResult) -> list[Importance]:
    """Gain's and retention's, over all strategies, then within each of them that has trials."""
    scopes = [None, *result.strategies] if len(result.strategies) > 1 else list(result.strategies)
    return [importance(result, measure, scope) for scope in scopes for measure in ("gain", "retention")]


def importance(result: SweepResult, measure: Measure, strategy: str | None = None) -> Importance:
    """The shares of one measure, over all strategies or within one."""
    rung, values = _measured_at(result, measure)
    trials = [trial for trial in _distinct(result.searched) if trial.name in values]
    trials = [trial for trial in trials if strategy in (None, trial.strategy)]
    columns = _columns(result, trials, strategy)
    outcome = np.array([values[trial.name] for trial in trials])
    refused = _refusal(len(trials), len(columns), outcome, measure)
    shares = () if refused else _shares(columns, outcome)
    return Importance(measure, strategy, len(trials), rung, shares, refused)


def _measured_at(result: SweepResult, measure: Measure) -> tuple[int, dict[str, float]]:
    """The rung at which most trials were measured (the last of several), and what they were there by name.

    Later rungs hold the survivors of a choice by that very measure, and would show less than there is.
    """
    by_rung: dict[int, dict[str, float]] = {}
    for trial in result.searched:
        for seen in trial.curve:
            value = getattr(seen, measure)
            if value is not None:
                by_rung.setdefault(seen.rung, {})[trial.name] = value
    for point in result.points:
        if point.alpha in (None, 1.0) and point.split == "validation":
            by_rung.setdefault(point.rung, {})[point.trial] = getattr(point, measure).value
    if not by_rung:
        return 0, {}
    rung = max(by_rung, key=lambda at: (len(by_rung[at]), at))
    return rung, by_rung[rung]


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """One trial a setting, which a space of few choices may draw several times."""
    first: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        first.setdefault((trial.strategy, repr(sorted(trial.config.items()))), trial)
    return list(first.values())


def _columns(result: SweepResult, trials: Sequence[Trial], strategy: str | None) -> dict[str, list[Scalar]]:
    """What each dimension was in every trial; those that some trial does not have, or that never varied, left out."""
    columns: dict[str, list[Scalar]] = {STRATEGY: [trial.strategy for trial in trials]} if strategy is None else {}
    for path in dict.fromkeys(dimension.path for dimension in result.dimensions):
        values = [_value(result.dimensions, path, trial) for trial in trials]
        if all(value is not None for value in values):
            columns[path] = values
    return {path: values for path, values in columns.items() if len(set(values)) > 1}


def _value(dimensions: Sequence[Dimension], path: str, trial: Trial) -> Scalar:
    """A number's place in its range, from 0 to 1, or a category by name; None where the trial has no such dimension."""
    own = (d for d in dimensions if d.path == path and (not d.strategies or trial.strategy in d.strategies))
    dimension = next(own, None)
    if dimension is None or path not in trial.config:
        return None
    given = trial.config[path]
    if dimension.kind == "category" or not isinstance(given, int | float):
        return str(given)
    return _place(dimension, float(given))


def _place(dimension: Dimension, given: float) -> float:
    assert dimension.low is not None
    assert dimension.high is not None
    ends = (dimension.low, dimension.high)
    low, high, value = (math.log(number) for number in (*ends, given)) if dimension.log else (*ends, given)
    # Population-based training may step out of the range that was drawn from.
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def _refusal(trials: int, dimensions: int, outcome: np.ndarray, measure: str) -> str | None:
    least = max(MIN_TRIALS, MIN_TRIALS_PER_DIMENSION * dimensions)
    if not dimensions:
        return "no dimension varied over these trials"
    if trials < least:
        return f"{trials} settings are too few to tell {dimensions} dimensions apart; {least} would do"
    if np.ptp(outcome) < 1e-12:
        return f"all trials have the same {measure}"
    return None


def _shares(columns: Mapping[str, Sequence[Scalar]], outcome: np.ndarray) -> tuple[Share, ...]:
    found = _fanova(columns, outcome, _TREES)
    rng = np.random.default_rng(0)
    shuffled = [_fanova(columns, rng.permutation(outcome), _SHUFFLED_TREES) for _ in range(_SHUFFLES)]
    shares = [Share(path, share, max(one[path] for one in shuffled)) for path, share in found.items()]
    return tuple(sorted(shares, key=lambda share: -share.share))


def _fanova(columns: Mapping[str, Sequence[Scalar]], outcome: np.ndarray, trees: int) -> dict[str, float]:
    """The share of the variance of every column, by Optuna."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {path: _distribution(values) for path, values in columns.items()}
    study = optuna.create_study()
    study.add_trials([_frozen(kinds, columns, row, float(value)) for row, value in enumerate(outcome)])
    found = FanovaImportanceEvaluator(n_trees=trees, seed=0).evaluate(study, params=list(columns))
    return {path: float(share) for path, share in found.items()}


def _distribution(values: Sequence[Scalar]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, float) for value in values):
        return FloatDistribution(0.0, 1.0)
    return CategoricalDistribution(sorted({str(value) for value in values}))


def _frozen(
    kinds: dict[str, BaseDistribution], columns: Mapping[str, Sequence[Scalar]], row: int, value: float
) -> FrozenTrial:
    from optuna.trial import create_trial

    return create_trial(params={path: columns[path][row] for path in columns}, distributions=kinds, value=value)
