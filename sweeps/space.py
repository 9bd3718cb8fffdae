"""Settings of trials: drawn from the space or laid out as its grid, and each made into the spec of a run."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from sweeps import result
from sweeps.presets import amounts, strategies
from sweeps.spec import Dimension, Range, Scalar, Strategy, SweepSpec
from training.errors import Problem, TenureError, fail, raise_all
from training.spec import RunSpec
from training.specfile import tell
from training.suite_spec import Suites

MOST_GRID_POINTS = 1000
_DRAWS = 16


@dataclass(frozen=True)
class Setting:
    """One point of the space: a strategy, and the values of its dimensions by dotted path."""

    strategy: str
    values: dict[str, Scalar]


def run_spec(
    sweep: SweepSpec,
    setting: Setting,
    *,
    name: str | None = None,
    seed: int | None = None,
    suites: Suites | None = None,
) -> RunSpec:
    """The spec of the run that tries a setting.

    Raises:
        TenureError: the run's own validation refuses it.
    """
    strategy = find_strategy(sweep, setting.strategy)
    raw = copy.deepcopy(sweep.run.model_dump(mode="json"))
    for section in ("objective", "tuning", "protections"):
        value = getattr(strategy, section)
        if value is not None:
            raw[section] = strategy.model_dump(mode="json")[section]
    for path, chosen in {**strategy.set, **setting.values}.items():
        _put(raw, path, chosen, strategy.name)
    raw["training"] |= {"validation_items": 0, "validate_every_steps": 0, "checkpoint_every_steps": 0}
    if seed is not None:
        raw["training"]["seed"] = seed
    raw |= {"name": name} if name else {}
    raw |= {"contract": sweep.contract.model_dump(mode="json")} if sweep.contract else {}
    raw |= {"suites": suites.model_dump(mode="json")} if suites else {}
    return _validated(raw, strategy.name)


def find_strategy(sweep: SweepSpec, name: str) -> Strategy:
    """The strategy of that name, with all its ranges."""
    return next(strategy for strategy in strategies(sweep) if strategy.name == name)


def _put(raw: dict[str, Any], path: str, value: Scalar, strategy: str) -> None:
    """Set the value at a dotted path."""
    *parents, last = path.split(".")
    here: Any = raw
    for part in parents:
        here = _inside(here, part, path, strategy)
    if isinstance(here, list):
        _inside(here, last, path, strategy)
        here[int(last)] = value
    else:
        here[last] = value


def _inside(here: Any, part: str, path: str, strategy: str) -> Any:
    if isinstance(here, dict) and here.get(part) is not None:
        return here[part]
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return here[int(part)]
    what = f"'{path}' leads nowhere in the runs of strategy '{strategy}': there is no '{part}'"
    known = f"known there: {', '.join(here)}" if isinstance(here, dict) else f"there are {len(here or ())} (from 0)"
    raise fail(what, "space", known)


def _validated(raw: dict[str, Any], strategy: str) -> RunSpec:
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        faults = error.errors()
        problems = []
        for fault in faults:
            what, instead = tell(RunSpec, fault)
            key = ".".join(map(str, (*fault["loc"], *fault.get("ctx", {}).get("at", ()))))
            problems.append(Problem(what, f"strategy '{strategy}': {key}", instead))
        raise TenureError(problems) from None


# ------------------------------------------------------------------------------------------------- drawing


def draw(sweep: SweepSpec, number: int) -> Setting:
    """The setting of a random search's trial: strategies in turn, values by the sweep's seed and the number.

    A setting that no run can have is drawn again.
    """
    known = strategies(sweep)
    strategy = known[number % len(known)]
    source = random.Random(f"{sweep.seed}/{number}")
    setting = _drawn(strategy, source)
    for _ in range(_DRAWS):
        if refusal(sweep, setting) is None:
            break
        setting = _drawn(strategy, source)
    return setting


def _drawn(strategy: Strategy, source: random.Random) -> Setting:
    return Setting(strategy.name, {path: _value(dim, source) for path, dim in sorted(strategy.space.items())})


def _value(dimension: Dimension, source: random.Random) -> Scalar:
    if not isinstance(dimension, Range):
        return source.choice(dimension)
    return at_share(dimension, source.random())


def at_share(dimension: Range, share: float) -> float | int:
    """The number a share (0 to 1) of the way from low to high."""
    if dimension.log:
        low, high = math.log(dimension.low), math.log(dimension.high)
        value = math.exp(low + share * (high - low))
    else:
        value = dimension.low + share * (dimension.high - dimension.low)
    if dimension.integer:
        return round(value)
    return min(max(float(f"{value:.6g}"), float(dimension.low)), float(dimension.high))


def refusal(sweep: SweepSpec, setting: Setting) -> TenureError | None:
    """Why no run can have the setting; None when one can."""
    try:
        run_spec(sweep, setting)
    except TenureError as error:
        return error
    return None


# --------------------------------------------------------------------------------------------------- grids


def grid_size(sweep: SweepSpec) -> int:
    """Points of the grid over all strategies."""
    return sum(math.prod(len(_grid_values(dim)) for dim in strategy.space.values()) for strategy in strategies(sweep))


def grid(sweep: SweepSpec) -> Iterator[Setting]:
    """Every point, strategy by strategy."""
    for strategy in strategies(sweep):
        paths = sorted(strategy.space)
        for values in product(*(_grid_values(strategy.space[path]) for path in paths)):
            yield Setting(strategy.name, dict(zip(paths, values, strict=True)))


def _grid_values(dimension: Dimension) -> tuple[Scalar, ...]:
    if not isinstance(dimension, Range):
        return dimension
    return tuple(dict.fromkeys(at_share(dimension, n / (dimension.points - 1)) for n in range(dimension.points)))


def settings(sweep: SweepSpec) -> list[Setting]:
    """The trials of a random or grid search in order; of a grid larger than the budget, a seeded sample."""
    if sweep.search != "grid":
        return [draw(sweep, number) for number in range(amounts(sweep).trials)]
    points = [setting for setting in grid(sweep) if refusal(sweep, setting) is None]
    most = sweep.budget.trials
    return random.Random(sweep.seed).sample(points, most) if most and most < len(points) else points


# -------------------------------------------------------------------------------------------------- checks


def check_space(sweep: SweepSpec) -> list[str]:
    """Refuse what cannot be searched, before anything starts; what a user should know all the same.

    Raises:
        TenureError: a grid without a budget that is too large, or strategies none of whose draws makes a valid run.
    """
    notes: list[str] = []
    size = grid_size(sweep) if sweep.search == "grid" else 0
    if size > MOST_GRID_POINTS and sweep.budget.trials is None:
        tokens = f", {size * sweep.tokens_per_trial:,} tokens" if sweep.tokens_per_trial else ""
        what = f"the grid has {size:,} points, so as many trials{tokens}"
        raise fail(what, "search", "set budget.trials to sample it, give fewer points, or search: random")
    problems: list[Problem] = []
    for strategy in strategies(sweep):
        source = random.Random(f"{sweep.seed}/{strategy.name}")
        refusals = [refusal(sweep, _drawn(strategy, source)) for _ in range(_DRAWS if strategy.space else 1)]
        refused = [one for one in refusals if one is not None]
        if len(refused) == len(refusals):
            problems += [
                Problem(f"no trial of this strategy can be valid: {first.what}", first.where, first.instead)
                for first in refused[0].problems[:1]
            ]
        elif refused:
            first = refused[0].problems[0]
            notes.append(f"strategy '{strategy.name}': {len(refused)} of {len(refusals)} draws refused: {first.what}")
    raise_all(problems)
    return notes


def dimensions(sweep: SweepSpec) -> tuple[result.Dimension, ...]:
    """The space as the result of a sweep tells it: a path that strategies vary alike is told once."""
    found: dict[tuple[str, str], tuple[Dimension, list[str]]] = {}
    for strategy in strategies(sweep):
        for path, dimension in strategy.space.items():
            found.setdefault((path, dimension_key(dimension)), (dimension, []))[1].append(strategy.name)
    every = len(strategies(sweep))
    return tuple(
        _told(path, dimension, tuple(names) if len(names) < every else ())
        for (path, _), (dimension, names) in found.items()
    )


def dimension_key(dimension: Dimension) -> str:
    return repr(dimension)


def _told(path: str, dimension: Dimension, names: tuple[str, ...]) -> result.Dimension:
    if not isinstance(dimension, Range):
        return result.Dimension(path=path, kind="category", choices=dimension, strategies=names)
    kind: Any = "int" if dimension.integer else "float"
    ends: Mapping[str, Any] = {"low": dimension.low, "high": dimension.high, "log": dimension.log}
    return result.Dimension(path=path, kind=kind, strategies=names, **ends)
