"""What came of a sweep: its trials, the points that they left, the finalists over seeds, and the winner.

Free of torch and Ray, so that a sweep is read, shown and judged anew anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.errors import fail
from training.evaluation.scorecard import State
from training.spec import Contract
from training.workspace import read_json, write_json

Scalar = str | int | float | bool | None
Split = Literal["validation", "test"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measured(_Record):
    """A figure with its 95 % interval, which holds it."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _interval_holds_the_value(self) -> Measured:
        # Sums in another order round in their last digits.
        if not self.low - 1e-9 <= self.value <= self.high + 1e-9:
            raise ValueError(f"[{self.low}, {self.high}] does not hold {self.value}")
        return self


class Suite(_Record):
    """One suite of a point or of a finalist: the base's score, the tuned one (a mean over seeds), and the change.

    `change` is positive where the tuned model is better, whatever the metric; `retention` is None for target suites and
    where the base is at chance. `bound` is what the contract asks: the least change of a target suite, the least
    retention of a retention suite.
    """

    name: str
    role: Literal["target", "retention"]
    metric: str
    unit: str
    base: float
    tuned: float
    change: Measured
    retention: Measured | None
    bound: float | None
    state: State


class RungMeasure(_Record):
    """What a trial was measured to be at a rung, on validation; None where it was not measured.

    `score` is what the search maximises (sweeps/steering.py).
    """

    rung: int
    tokens: int
    seconds: float
    gain: float | None = None
    retention: float | None = None
    kl_to_base: float | None = None
    loss: float | None = None
    score: float | None = None


TrialState = Literal["finished", "stopped", "failed"]


class Trial(_Record):
    """One trial: what was tried (`config` by dotted path of the spec), how far it came, and what it cost.

    `cause` says why it was stopped or why it failed. `attempts` counts the first one. `run` names its run folder.
    `rerun_of` names the trial whose setting a finalist tries again under another seed: the search did not draw it.
    """

    name: str
    strategy: str
    config: dict[str, Scalar]
    seed: int
    rung: int
    state: TrialState
    cause: str | None = None
    tokens: int
    seconds: float
    gpu_hours: float
    curve: tuple[RungMeasure, ...] = ()
    attempts: int = 1
    run: str | None = None
    rerun_of: str | None = None

    @model_validator(mode="after")
    def _has_a_cause(self) -> Trial:
        if self.state != "finished" and not self.cause:
            raise ValueError(f"trial '{self.name}' is {self.state}, and nothing says why")
        return self


class Point(_Record):
    """One scored model: a trial's, or one between the base and it (`alpha`, WiSE-FT), under one seed.

    `gain` is the mean change over the target suites of the sweep's unit, `retention` the least and `retention_mean`
    the mean over retention suites, each of min(1, r / r_0); see sweeps/measures.py. `tokens` and `gpu_hours` are what
    the trial spent up to here, scoring included; points of one trial do not add up. `kl_to_base` is in nats a target
    token.
    """

    trial: str
    strategy: str
    alpha: float | None = None
    seed: int
    rung: int
    gain: Measured
    retention: Measured
    retention_mean: Measured
    kl_to_base: float | None = None
    contract: State
    split: Split
    tokens: int
    gpu_hours: float
    suites: tuple[Suite, ...] = ()
    artifact: str | None = None


class Finalist(_Record):
    """A setting run again under several seeds, which are pooled; `trials` are their names, one a seed.

    `reasons` are the contract's, for promises that are broken or open.
    """

    trial: str
    strategy: str
    alpha: float | None = None
    seeds: tuple[int, ...]
    trials: tuple[str, ...]
    gain: Measured
    retention: Measured
    retention_mean: Measured
    contract: State
    reasons: tuple[str, ...] = ()
    split: Split
    suites: tuple[Suite, ...] = ()


class Winner(_Record):
    """The setting that the sweep recommends: chosen on validation alone, then scored once on test (`test`).

    `spec_yaml` is a complete run spec that reproduces it; `artifact` and `run` are the model to promote.
    """

    trial: str
    strategy: str
    alpha: float | None = None
    seeds: tuple[int, ...]
    reason: str
    spec_yaml: str
    test: Finalist | None = None
    artifact: str | None = None
    run: str | None = None


class Dimension(_Record):
    """One dimension of the search space. `strategies` names those that have it; empty: all do.

    Numbers have `low` and `high`; a category has `choices`. `log` is whether it was drawn on a logarithmic scale.
    """

    path: str
    kind: Literal["float", "int", "category"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Scalar, ...] = ()
    strategies: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_its_bounds(self) -> Dimension:
        if self.kind == "category" and not self.choices:
            raise ValueError(f"category '{self.path}' has no choices")
        if self.kind != "category" and (self.low is None or self.high is None or self.low > self.high):
            raise ValueError(f"dimension '{self.path}' has no range")
        return self


class Amount(_Record):
    """A budget, or what was spent of it; None in a budget is no bound."""

    trials: int | None = None
    gpu_hours: float | None = None
    hours: float | None = None
    tokens: int | None = None


class SweepResult(_Record):
    """A sweep, finished or under way (`finished` is None then). Times are ISO 8601 in UTC.

    `gain_unit` is that of the gains: "share", or nats per byte or token. `search` says in words how it searched
    (algorithm, scheduler, preset), `hashes` what it was searched on. `full_strategy` is the strategy that is full
    tuning without protections, where there is one: gains are told as shares of its best.
    """

    schema_version: Literal[1] = 1
    name: str
    base: str
    contract: Contract
    gain_unit: str
    target_suites: tuple[str, ...]
    retention_suites: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    points: tuple[Point, ...]
    finalists: tuple[Finalist, ...] = ()
    winner: Winner | None = None
    full_strategy: str | None = None
    search: str = ""
    budget: Amount = Amount()
    spent: Amount = Amount()
    started: str
    finished: str | None = None
    hashes: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_agree(self) -> SweepResult:
        known = {trial.name for trial in self.trials}
        if len(known) != len(self.trials):
            raise ValueError("two trials have one name")
        named = {point.trial for point in self.points} | {name for f in self.finalists for name in f.trials}
        if named - known:
            raise ValueError(f"points or finalists name trials that are not there: {', '.join(sorted(named - known))}")
        return self

    @property
    def searched(self) -> tuple[Trial, ...]:
        """The trials of the search, without those that finalists were tried again by."""
        return tuple(trial for trial in self.trials if trial.rerun_of is None)

    def trial(self, name: str) -> Trial:
        return next(trial for trial in self.trials if trial.name == name)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy that has a trial, in the order of their first ones."""
        return tuple(dict.fromkeys(trial.strategy for trial in self.trials))


def write_result(path: Path, result: SweepResult) -> None:
    """Write a result so that a reader sees the old file or the whole new one."""
    write_json(path, result.model_dump(mode="json"))


def read_result(path: Path) -> SweepResult | None:
    """The result in a file; None when there is none.

    Raises:
        TenureError: the file is no sweep's result.
    """
    if not path.is_file():
        return None
    try:
        return SweepResult.model_validate(read_json(path))
    except ValueError as error:  # bad JSON and what pydantic finds alike
        first = str(error).strip().splitlines()
        raise fail(f"this is no result of a sweep: {' '.join(first[:3])}", str(path), "restore the file") from None
