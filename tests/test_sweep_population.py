"""Population-based training: who follows whom, and what of a setting changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_spec import write_tiny_spec

from sweeps.loading import load_sweep
from sweeps.population import Member, Population, evolved, first
from sweeps.presets import amounts
from sweeps.spec import SweepSpec
from training.errors import TenureError

RATE = {"low": 1e-4, "high": 1e-2, "log": True}
LORA = {
    "name": "lora",
    "tuning": {"type": "lora"},
    "space": {"training.learning_rate": RATE, "tuning.rank": {"low": 2, "high": 8, "integer": True}},
}


def read(folder: Path, **keys: Any) -> SweepSpec:
    write_tiny_spec(folder, Path("/models/tiny"))
    path = folder / "sweep.yaml"
    given = {"name": "s", "base": "spec.yaml", "search": "pbt", "strategies": [LORA], "budget": {"trials": 8}}
    path.write_text(yaml.safe_dump(given | keys), encoding="utf-8")
    return load_sweep(path)[0]


def test_the_worst_quarter_follows_the_best(tmp_path: Path) -> None:
    sweep = read(tmp_path)
    before = first(sweep)
    scores = {member.name: float(number) for number, member in enumerate(before.members)}
    after = evolved(sweep, before, scores)
    assert after.generation == 1
    parents = {member.name: member.parent for member in after.members}
    assert {name: parent for name, parent in parents.items() if parent == name} == {
        f"trial-{n:03d}": f"trial-{n:03d}" for n in range(2, 8)
    }
    assert {parents["trial-000"], parents["trial-001"]} <= {"trial-006", "trial-007"}


def test_a_follower_changes_what_may_change_within_its_range_and_keeps_shapes(tmp_path: Path) -> None:
    sweep = read(tmp_path)
    rates = set()
    for generation in range(40):
        winner = Member("b", "lora", {"training.learning_rate": 9e-3, "tuning.rank": 4})
        loser = Member("a", "lora", {"training.learning_rate": 1e-3, "tuning.rank": 8})
        after = evolved(sweep, Population(generation, (loser, winner)), {"a": 0.0, "b": 1.0})
        follower = next(member for member in after.members if member.name == "a")
        assert follower.values["tuning.rank"] == 4
        rates.add(follower.values["training.learning_rate"])
    assert {0.0072, 0.01} <= rates  # a fifth less, and a fifth more up to the end of the range
    assert len(rates) > 4  # and fresh draws
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


def test_the_same_scores_make_the_same_generation(tmp_path: Path) -> None:
    sweep = read(tmp_path)
    scores = {member.name: hash(member.name) % 7 / 7 for member in first(sweep).members}
    assert evolved(sweep, first(sweep), scores) == evolved(sweep, first(sweep), scores)


def test_who_did_not_come_to_the_end_is_gone(tmp_path: Path) -> None:
    sweep = read(tmp_path)
    after = evolved(sweep, first(sweep), {"trial-003": 1.0})
    assert [(member.name, member.parent) for member in after.members] == [("trial-003", "trial-003")]


def test_generations_are_of_equal_length(tmp_path: Path) -> None:
    from sweeps.steering import steps_of

    sweep = read(tmp_path)
    assert [steps_of(sweep, rung, 100) for rung in range(amounts(sweep).rungs)] == [25, 50, 75, 100]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"rungs": 1}, "over 1 generations"),
        ({"budget": {"trials": 1}}, "a population of 1"),
        ({"strategies": [{**LORA, "set": {"training.learning_rate": 1e-3}, "space": {"tuning.rank": [2, 4]}}]},
         "nothing of the space may change"),
    ],
)  # fmt: skip
def test_what_cannot_evolve_is_refused(tmp_path: Path, keys: dict[str, Any], what: str) -> None:
    with pytest.raises(TenureError, match=what):
        read(tmp_path, **keys)
