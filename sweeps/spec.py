"""The spec of a sweep: a base run, what is varied over it, how it is searched and for how long.

Frozen, closed, and free of torch, ray and transformers, as the spec of a run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from training.section import Count, Flag, Fraction, Name, Natural, Positive, Section, Text, fault
from training.spec import Contract, RunSpec
from training.strategy import Objective, Protection, Tuning
from training.suite_spec import Suites

Scalar = str | int | float | bool | None
Number = int | float
LEARNING_RATE = "training.learning_rate"


class Range(Section):
    """Numbers from `low` to `high`, drawn evenly or evenly on a logarithmic scale. A grid takes `points` of them."""

    low: Number
    high: Number
    log: Flag = False
    integer: Flag = False
    points: Annotated[int, Field(strict=True, ge=2)] = 3

    @model_validator(mode="after")
    def _holds_numbers(self) -> Range:
        if self.low >= self.high:
            what = f"no number lies between low: {self.low:g} and high: {self.high:g}"
            raise fault(what, "give the smaller one as low; for one value, set it instead")
        if self.log and self.low <= 0:
            raise fault(f"low: {self.low:g} has no logarithm", "give a low above 0, or log: false", ("low",))
        if self.integer and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise fault("the ends of whole numbers are whole", "give whole numbers, or integer: false", ("low",))
        return self


def _holds_something(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise fault("there is nothing to choose from", "list the values, or give low and high")
    return value


Dimension = Annotated[Range | tuple[Scalar, ...], BeforeValidator(_holds_something)]
Space = dict[Text, Dimension]


class Strategy(Section):
    """What a sweep compares: a tuning, an objective, protections, with values and ranges of their own.

    What is left out is the base's. `set` and `space` go by dotted paths of the run spec (`protections.0.strength`).
    """

    name: Name
    objective: Objective | None = None
    tuning: Tuning | None = None
    protections: tuple[Protection, ...] | None = None
    set: dict[Text, Scalar] = Field(default_factory=dict)
    space: Space = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sets_or_varies(self) -> Strategy:
        both = sorted(self.set.keys() & self.space.keys())
        if both:
            what = f"'{both[0]}' is set to one value and varied"
            raise fault(what, "keep it under set or under space", ("space", both[0]))
        return self


class Budget(Section):
    """When the search ends, whichever comes first; finalists come on top. None is no bound."""

    trials: Count | None = None
    gpu_hours: Positive | None = None
    hours: Positive | None = None
    tokens: Count | None = None


class Split(Section):
    """The share of every suite's items that is kept for the winner's one test; items go by their content's hash."""

    test_share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    seed: Natural = 0


Preset = Literal["quick", "standard", "thorough"]
Search = Literal["random", "grid", "tpe", "multi-objective", "pbt"]


class SweepSpec(Section):
    """A sweep. `base` is a run spec, or the path of one; `contract` takes the place of the base's."""

    name: Name | None = None
    base: RunSpec | Text
    contract: Contract | None = None
    preset: Preset | None = None
    strategies: tuple[Strategy, ...] = ()
    space: Space = Field(default_factory=dict)
    search: Search = "random"
    scheduler: Literal["asha", "none"] | None = None
    objective: Literal["gain", "pareto"] = "gain"
    budget: Budget = Budget()
    tokens_per_trial: Count | None = None
    rungs: Annotated[int, Field(strict=True, ge=1, le=6)] | None = None
    reduction: Annotated[int, Field(strict=True, ge=2)] = 3
    finalists: Natural | None = None
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] | None = None
    alphas: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    split: Split = Split()
    test: Suites | None = None
    seed: Natural = 0
    trials_per_gpu: Count = 1
    trials_at_once: Count | None = None
    stop_at_loss: Annotated[float, Field(strict=True, ge=1)] | None = 3.0
    wait_s: Positive = 120.0

    @field_validator("base")
    @classmethod
    def _trials_are_scored_in_memory(cls, value: RunSpec | str) -> RunSpec | str:
        if isinstance(value, RunSpec) and value.evaluation.engine != "transformers":
            what = "a sweep's trials are scored in memory, where vLLM is not"
            raise fault(what, "set engine: transformers", ("evaluation", "engine"))
        return value

    @field_validator("strategies")
    @classmethod
    def _names_differ(cls, value: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        names = [strategy.name for strategy in value]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise fault(f"two strategies are called '{name}'", "give each its own name", (index, "name"))
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise fault("a seed is given twice", "give each seed once")
        return value

    @model_validator(mode="after")
    def _varies_something(self) -> SweepSpec:
        varied = bool(self.strategies or self.space or self.preset)
        if not varied:
            what = "the space is empty: every trial would be the base"
            raise fault(what, "give strategies, a space, or preset: quick")
        for strategy in self.strategies:
            both = sorted(strategy.space.keys() & self.space.keys())
            if both:
                what = f"'{both[0]}' has a range in space and another in strategy '{strategy.name}'"
                raise fault(what, "keep one of them; a strategy may set what the space varies", ("space", both[0]))
        return self

    @property
    def run(self) -> RunSpec:
        """The base as a run spec; the loader has put it there."""
        assert isinstance(self.base, RunSpec)
        return self.base

    @property
    def title(self) -> str:
        """Its name, or one after the base's."""
        return self.name or f"{self.run.name}-sweep"
