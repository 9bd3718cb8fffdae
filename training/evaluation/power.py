"""What a suite can show, told before training from the base's own scores: is it above chance, are its items enough?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from training.data.items import Answered
from training.evaluation.judge import FEW_ITEMS, against_base, threshold_of
from training.evaluation.metrics import NATS
from training.evaluation.stats import items_to_see
from training.spec import RunSpec
from training.suite_spec import Answering, AnySuite

# Var(tuned - base) over Var(base), item by item: the upper end of what was measured (docs/measures.md).
# A target is expected to change anywhere, as if base and tuned were independent.
_SPREAD = {"target": 2.0, "retention": 0.25}
_ONE_SIDED = 1.645  # the normal's 95 % point


@dataclass(frozen=True)
class Power:
    """What one suite can show. `above_chance` and `items_above_chance` are about retention suites alone.

    `silent` and `unreadable` count the base's answers that are empty, or in which the metric finds nothing to read.
    """

    name: str
    role: Literal["target", "retention"]
    num_items: int
    base: float
    chance: float
    threshold: float
    items_to_see: int | None
    above_chance: bool = True
    items_above_chance: int | None = None
    silent: int = 0
    unreadable: int = 0

    @property
    def enough(self) -> bool:
        """Whether the items are enough to see the threshold; a threshold of 0 is beyond any number of items."""
        return self.items_to_see is None or self.num_items >= self.items_to_see


def powers(spec: RunSpec, base: Mapping[str, Sequence[Answered]]) -> list[Power]:
    """What every suite can show, from the base's answers."""
    found = [_power(suite, "target", base[suite.name], spec) for suite in spec.suites.target]
    return [*found, *(_power(suite, "retention", base[suite.name], spec) for suite in spec.suites.retention)]


def _power(suite: AnySuite, role: Literal["target", "retention"], answers: Sequence[Answered], spec: RunSpec) -> Power:
    answers = against_base(suite, list(answers), list(answers))[0]
    scores, weights = (np.array([getattr(answer, name) for answer in answers]) for name in ("score", "weight"))
    share = suite.metric not in NATS
    base, chance = (float(np.average(v, weights=weights)) for v in (scores, [a.chance for a in answers]))
    threshold = threshold_of(suite, role, spec.contract)
    needed = items_to_see(threshold, _deviation(scores, weights, role, threshold, share))
    silent = sum(not answer.answer.strip() for answer in answers) if isinstance(suite, get_args(Answering)) else 0
    unreadable = sum(not answer.readable for answer in answers)
    power = Power(suite.name, role, len(answers), base, chance, threshold, needed, silent=silent, unreadable=unreadable)
    return _with_chance(power, share) if role == "retention" else power


def _deviation(scores: np.ndarray, weights: np.ndarray, role: str, threshold: float, share: bool) -> float:
    """The standard deviation to expect of the paired, weighted differences.

    A share moves at least where the threshold is reached: by one whole item in `threshold` of them.
    """
    relative = weights / weights.mean()
    variance = _SPREAD[role] * float((relative * (scores - np.average(scores, weights=weights)) ** 2).mean())
    least = threshold * (1 - threshold) if share and threshold < 1 else 0.0
    return math.sqrt(max(variance, least))


def _with_chance(power: Power, share: bool) -> Power:
    """The power of a retention suite with what is said about chance; a cross-entropy knows none."""
    above, chance = power.base - power.chance, power.chance
    spread = _ONE_SIDED**2 * chance * (1 - chance)
    if not share or (above > 0 and above**2 * power.num_items >= spread):
        return power
    needed = math.ceil(spread / above**2) if above > 0 else None
    return Power(**{**vars(power), "above_chance": False, "items_above_chance": needed})


def warnings(found: Sequence[Power]) -> Iterator[str]:
    """A sentence for every suite that cannot show what it is asked for."""
    for power in found:
        yield from _answer_warnings(power)
        if power.num_items < FEW_ITEMS:
            yield f"{power.name}: {power.num_items} items are too few to tell a change from chance"
        if not power.above_chance:
            yield f"{power.name}: {_chance_text(power)}"
        if not power.enough and power.items_to_see is not None:
            change = "gain" if power.role == "target" else "loss"
            yield (
                f"{power.name}: {power.num_items:,} items are too few to see a {change} of {power.threshold:g}: "
                f"it would take about {power.items_to_see:,}"
            )


def _answer_warnings(power: Power) -> Iterator[str]:
    if power.silent:
        yield f"{power.name}: the base answers nothing to {power.silent:,} of {power.num_items:,} items"
    if power.unreadable:
        yield f"{power.name}: the metric can read nothing in {power.unreadable:,} of {power.num_items:,} of its answers"


def _chance_text(power: Power) -> str:
    text = f"the base scores {power.base:.4f} and a guess {power.chance:.4f}: "
    if power.items_above_chance is None:
        return f"{text}it knows nothing here that could be forgotten, however many items there are"
    return f"{text}{power.num_items:,} items do not show more than chance, about {power.items_above_chance:,} might"
