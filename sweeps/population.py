"""Population-based training: losing members go on from winners' weights and settings, with those settings changed.

Source: Jaderberg et al., Population Based Training of Neural Networks, arXiv 1711.09846: truncation selection (the
worst quarter copies one of the best quarter, drawn evenly), and of each number a fifth more or less, or a fresh draw
one time in four. Generations wait for each other, so that what comes of a seed does not depend on which trial was
faster, and the population lies in a file between them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sweeps.folder import SweepFolder
from sweeps.presets import amounts
from sweeps.space import Setting, at_share, draw, find_strategy, refusal
from sweeps.spec import Range, Scalar, SweepSpec
from training.workspace import read_json, write_json

SHARE, FACTORS, RESAMPLED = 0.25, (0.8, 1.25), 0.25
# What may change while a model is trained: it leaves the shape of weights and of batches as they are.
_CHANGEABLE = ("training.learning_rate", "training.weight_decay", "training.max_grad_norm")


@dataclass(frozen=True)
class Member:
    """One of the population: its trial's name, its setting, and whose weights it starts the generation from."""

    name: str
    strategy: str
    values: dict[str, Scalar]
    parent: str | None = None


@dataclass(frozen=True)
class Population:
    """The members of a generation, counted from 0."""

    generation: int
    members: tuple[Member, ...]


def first(sweep: SweepSpec) -> Population:
    """As many settings as the budget has trials."""
    drawn = [draw(sweep, number) for number in range(amounts(sweep).trials)]
    members = [Member(f"trial-{number:03d}", one.strategy, one.values) for number, one in enumerate(drawn)]
    return Population(0, tuple(members))


def evolved(sweep: SweepSpec, before: Population, scores: Mapping[str, float]) -> Population:
    """The next generation.

    Args:
        scores: of the members that came to the generation's end, by name; the others are gone.
    """
    alive = [member for member in before.members if member.name in scores]
    ranked = sorted(alive, key=lambda member: -scores[member.name])
    count = int(len(ranked) * SHARE + 0.5) if len(ranked) > 1 else 0
    best, worst = ranked[:count], {member.name for member in ranked[len(ranked) - count :]}
    source = random.Random(f"{sweep.seed}/generation/{before.generation + 1}")
    members = [
        _follower(sweep, member, source.choice(best), source)
        if member.name in worst
        else replace(member, parent=member.name)
        for member in alive
    ]
    return Population(before.generation + 1, tuple(members))


def _follower(sweep: SweepSpec, member: Member, winner: Member, source: random.Random) -> Member:
    """A member that takes over from a winner."""
    space = find_strategy(sweep, winner.strategy).space
    changed = {path: _changed(path, value, space.get(path), source) for path, value in winner.values.items()}
    values = winner.values if refusal(sweep, Setting(winner.strategy, changed)) else changed
    return Member(member.name, winner.strategy, dict(values), winner.name)


def _changed(path: str, value: Scalar, dimension: Any, source: random.Random) -> Scalar:
    """A number a fifth larger or smaller within its range, or drawn anew; what may not change as it is."""
    if not (isinstance(dimension, Range) and is_changeable(path)) or isinstance(value, bool | str | None):
        return value
    if source.random() < RESAMPLED:
        return at_share(dimension, source.random())
    moved = min(max(value * source.choice(FACTORS), float(dimension.low)), float(dimension.high))
    return round(moved) if dimension.integer else float(f"{moved:.6g}")


def is_changeable(path: str) -> bool:
    """Whether a value may change between generations."""
    return path in _CHANGEABLE or path.startswith(("protections.", "objective."))


def read_population(folder: SweepFolder) -> Population | None:
    """The population under way; None before the first."""
    if not folder.population.is_file():
        return None
    raw = read_json(folder.population)
    return Population(raw["generation"], tuple(Member(**member) for member in raw["members"]))


def write_population(folder: SweepFolder, population: Population) -> None:
    write_json(folder.population, asdict(population))


def trained(folder: SweepFolder, members: Sequence[Member], generation: int) -> dict[str, float]:
    """The scores of the members that have come to a generation's end, by name."""
    curves = {member.name: folder.noted_curve(member.name) for member in members}
    found = {name: curve.get(generation) for name, curve in curves.items()}
    return {name: score for name, score in found.items() if score is not None}
