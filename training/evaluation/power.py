"""What a suite can show, told before training from the base's own scores: is it above chance, are its items enough?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.data.items import Answered
from training.evaluation.judge import against_base, threshold_of
from training.evaluation.metrics import NATS
from training.evaluation.stats import items_to_see
from training.spec import RunSpec
from training.suite_spec import AnySuite

# Var(tuned - base) over Var(base), item by item: the upper end of what was measured (docs/measures.md).
# A target is expected to change anywhere, as if base and tuned were independent.
_SPREAD = {"target": 2.0, "retention": 0.25}
_ONE_SIDED = 1.645  # the normal's 95 % point


@dataclass(frozen=True)
class Power:
    """What one suite can show. `above_chance` and `items_above_chance` are about retention suites alone."""

    name: str
    role: Literal["target", "retention"]
    num_items: int
    base: float
    chance: float
    threshold: float
    items_to_see: int | None
    above_chance: bool = True
    items_above_chance: int | None = None

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
    base, chance = float(np.average(scores, weights=weights)), float(np.mean([a.chance for a in answers]))
    threshold = threshold_of(suite, role, spec.contract)
    needed = items_to_see(threshold, _deviation(scores, weights, role, threshold, share))
    power = Power(suite.name, role, len(answers), base, chance, threshold, needed)
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
        if not power.above_chance:
            yield f"{power.name}: {_chance_text(power)}"
        if not power.enough and power.items_to_see is not None:
            change = "gain" if power.role == "target" else "loss"
            yield (
                f"{power.name}: {power.num_items:,} items are too few to see a {change} of {power.threshold:g}: "
                f"it would take about {power.items_to_see:,}"
            )


def _chance_text(power: Power) -> str:
    text = f"the base scores {power.base:.4f} and a guess {power.chance:.4f}: "
    if power.items_above_chance is None:
        return f"{text}it knows nothing here that could be forgotten, however many items there are"
    return f"{text}{power.num_items:,} items do not show more than chance, about {power.items_above_chance:,} might"
