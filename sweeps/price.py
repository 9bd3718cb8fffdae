"""What a sweep will take, before anything runs: trials side by side, tokens, hours and memory.

Tokens follow from the search. Hours need a step's time, and that is only ever one that was measured: of earlier runs in
the workspace whose steps have the same shape. Where there is none the time is unknown, and said to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.reporting.curves import read_metrics
from training.workspace import RunFolder, Workspace, read_json

# The first steps of a run wait for caches, allocators and compilers.
_WARM_UP_STEPS, _MIN_STEPS = 2, 3


@dataclass(frozen=True)
class Search:
    """How a sweep searches: trials over rungs that grow by `reduction`, the last of `tokens_per_trial` tokens.

    `finalists` run again under `seeds` seeds in all. Every trial is scored at each of its rungs, and a finished one at
    `alphas` points between the base and itself; one that runs again at the point that is a finalist.
    """

    trials: int
    rungs: int
    reduction: int
    tokens_per_trial: int
    finalists: int = 0
    seeds: int = 1
    alphas: int = 0


@dataclass(frozen=True)
class Load:
    """What a search takes in all: `trials` are those started, finalists' further seeds included."""

    trials: int
    tokens: int
    scorings: int


def rung_tokens(search: Search) -> list[int]:
    """Tokens that a trial has seen at the end of every rung."""
    last = search.rungs - 1
    return [math.ceil(search.tokens_per_trial / search.reduction ** (last - rung)) for rung in range(search.rungs)]


def survivors(search: Search) -> list[int]:
    """Trials that reach each rung when exactly one in `reduction` goes on: the least that successive halving takes."""
    return [max(1, math.ceil(search.trials / search.reduction**rung)) for rung in range(search.rungs)]


def least_load(search: Search) -> Load:
    """What the search takes when halving bites at once. Asynchronous halving lets early trials on and takes more.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, arXiv 1810.05934.
    """
    return _load(search, survivors(search))


def most_load(search: Search) -> Load:
    """What the search takes when no trial is stopped."""
    return _load(search, [search.trials] * search.rungs)


def _load(search: Search, reached: Sequence[int]) -> Load:
    ends = rung_tokens(search)
    parts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    again = search.finalists * (search.seeds - 1)
    tokens = sum(count * part for count, part in zip(reached, parts, strict=True)) + again * search.tokens_per_trial
    tests = search.seeds if search.finalists else 0  # of the winner alone
    scorings = sum(reached) + reached[-1] * search.alphas + again * (1 + min(1, search.alphas)) + tests
    return Load(search.trials + again, tokens, scorings)


def at_once(have: Mapping[str, float], wants: Mapping[str, float]) -> int:
    """Trials that fit side by side into a cluster's resources; 0 where one does not fit."""
    return int(min(have.get(name, 0.0) / amount + 1e-9 for name, amount in wants.items() if amount > 0))


def missing(have: Mapping[str, float], wants: Mapping[str, float]) -> list[str]:
    """What a trial wants more of than the whole cluster has, in words."""
    return [
        f"{amount:g} {name} for a trial, and the cluster has {have.get(name, 0.0):g}"
        for name, amount in wants.items()
        if have.get(name, 0.0) < amount
    ]


# ------------------------------------------------------------------------------------------------ measured times


@dataclass(frozen=True)
class Timing:
    """Seconds for a token of training, as measured in a run's later steps; of scoring, None where it never scored."""

    run: str
    num_steps: int
    seconds_per_token: float
    scoring_seconds: float | None = None


def shape_of(spec: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how long a step takes, beside its tokens and the machine; of the JSON of a run's spec and plan.

    Strengths and rates do not; the kinds of protections do, for some run a frozen model beside.
    """
    training, scaling, tuning = spec["training"], spec["scaling"], spec["tuning"]
    return (
        Path(spec["model"]).name,
        plan["model_parameters"],
        spec["objective"]["type"],
        tuning["type"],
        plan["trainable_parameters"],
        tuple(sorted(protection["type"] for protection in spec["protections"])),
        plan["micro_batch_size"],
        plan["zero_stage"],
        training["precision"],
        bool(plan.get("row_tokens")),  # whether rows are packed; the spec may leave it open
        scaling["workers"],
        scaling["cpus_per_worker"],
        scaling["gpus_per_worker"],
    )


def known_timings(workspace: Workspace) -> dict[tuple[Any, ...], Timing]:
    """The times of all shapes that were ever run here, by the newest run of each."""
    folders = workspace.runs.iterdir() if workspace.runs.is_dir() else ()
    found: dict[tuple[Any, ...], Timing] = {}
    for folder in sorted((RunFolder(path) for path in folders), key=_age):
        if not (folder.spec.is_file() and folder.plan.is_file()):
            continue
        timing = measured(folder)
        if timing:
            found[shape_of(read_json(folder.spec), read_json(folder.plan))] = timing
    return found


def _age(folder: RunFolder) -> float:
    return folder.metrics.stat().st_mtime if folder.metrics.is_file() else 0.0


def measured(folder: RunFolder) -> Timing | None:
    """What a run's steps took; None for one that was too short to tell."""
    metrics = read_metrics(folder.metrics)
    steps = metrics.steps[_WARM_UP_STEPS:] if metrics else ()
    tokens = sum(step.num_tokens for step in steps)
    if len(steps) < _MIN_STEPS or tokens == 0:
        return None
    return Timing(folder.id, len(steps), sum(step.seconds for step in steps) / tokens, _scoring(folder.scorecard))


def _scoring(path: Path) -> float | None:
    # The scorecard's own seconds leave out what was found in the cache, and may be none at all.
    return (float(read_json(path)["seconds"]) or None) if path.is_file() else None


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class StrategyPrice:
    """A strategy's trial: parameters that move, memory a worker, the time of its steps where it is known."""

    name: str
    trainable_parameters: int
    memory_bytes: int
    steps: int
    timing: Timing | None


@dataclass(frozen=True)
class Price:
    """A sweep before it runs. Hours are None where a strategy's time is unknown."""

    search: Search
    strategies: tuple[StrategyPrice, ...]
    side_by_side: int
    gpus_per_trial: float
    grid_points: int | None = None

    @property
    def unknown(self) -> tuple[str, ...]:
        """The strategies whose step time was never measured here."""
        return tuple(one.name for one in self.strategies if one.timing is None)

    def hours(self, load: Load) -> float | None:
        """Wall hours of a load: strategies take turns, so their mean time counts; trials run side by side."""
        work = self.work_hours(load)
        return None if work is None else work / max(1, min(self.side_by_side, load.trials))

    def work_hours(self, load: Load) -> float | None:
        """Hours summed over trials."""
        known = [one.timing for one in self.strategies if one.timing]
        if len(known) < len(self.strategies) or not known:
            return None
        training = load.tokens * sum(timing.seconds_per_token for timing in known) / len(known)
        scored = [timing.scoring_seconds for timing in known if timing.scoring_seconds is not None]
        scoring = load.scorings * sum(scored) / len(scored) if scored else 0.0
        return (training + scoring) / 3600

    def gpu_hours(self, load: Load) -> float | None:
        work = self.work_hours(load)
        return None if work is None else work * self.gpus_per_trial

    @property
    def scoring_is_known(self) -> bool:
        return any(one.timing and one.timing.scoring_seconds is not None for one in self.strategies)


def ladder(search: Search, trials: Iterable[int]) -> Iterator[tuple[Search, Load]]:
    """The same search with other numbers of trials: what each budget buys."""
    for count in sorted(set(trials)):
        other = replace(search, trials=count)
        yield other, least_load(other)


def trials_for(search: Search, tokens: int) -> int:
    """The most trials whose search takes no more than so many tokens, when halving bites at once."""
    low, high = 0, 1
    while least_load(replace(search, trials=high)).tokens <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if least_load(replace(search, trials=middle)).tokens <= tokens else (low, middle)
    return low
