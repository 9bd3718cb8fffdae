"""The spec of a sweep: what it takes, what it refuses and why, and the runs that its settings make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_spec import write_tiny_spec

from sweeps.loading import load_sweep
from sweeps.presets import amounts, strategies
from sweeps.space import MOST_GRID_POINTS, Setting, draw, grid, grid_size, run_spec, settings
from sweeps.spec import SweepSpec
from training.errors import TenureError
from training.strategy import L2sp, Lora

RATE = {"low": 1e-4, "high": 1e-2, "log": True}
FULL = {"name": "full", "tuning": {"type": "full"}, "space": {"training.learning_rate": RATE}}
PULLED = {
    "name": "pulled",
    "tuning": {"type": "full"},
    "protections": [{"type": "l2sp", "strength": 0.1}],
    "space": {"protections.0.strength": {"low": 0.01, "high": 1.0}},
}


def read(folder: Path, **keys: Any) -> tuple[SweepSpec, list[str]]:
    """A sweep over the tiny run, whose model is not looked for."""
    write_tiny_spec(folder, Path("/models/tiny"))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": "spec.yaml", **keys}), encoding="utf-8")
    return load_sweep(path)


def refused(folder: Path, **keys: Any) -> str:
    with pytest.raises(TenureError) as caught:
        read(folder, **keys)
    return str(caught.value)


def test_three_lines_are_a_sweep(tmp_path: Path) -> None:
    write_tiny_spec(tmp_path, Path("/models/tiny"))
    path = tmp_path / "sweep.yaml"
    path.write_text("base: spec.yaml\ncontract: {max_loss: 0.05}\npreset: quick\n", encoding="utf-8")
    sweep, _ = load_sweep(path)
    assert sweep.title == "tiny-sweep"
    assert len({setting.strategy for setting in settings(sweep)}) >= 6
    assert run_spec(sweep, settings(sweep)[0]).contract.max_loss == 0.05


def test_adapters_get_ten_times_the_rate_of_full_tuning(tmp_path: Path) -> None:
    sweep, _ = read(tmp_path, preset="quick")
    ranges: dict[str, Any] = {one.name: one.space["training.learning_rate"] for one in strategies(sweep)}
    assert ranges["lora"].low == pytest.approx(10 * ranges["full"].low)
    assert ranges["lora"].high == pytest.approx(10 * ranges["full"].high)


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'strategies'?" in refused(tmp_path, strategys=[])


@pytest.mark.parametrize("key", ["rungs", "trials_per_gpu"])
def test_a_trial_of_several_workers_goes_in_one_go(tmp_path: Path, key: str) -> None:
    write_tiny_spec(tmp_path, Path("/models/tiny"), scaling={"workers": 2})
    path = tmp_path / "sweep.yaml"
    asked = {"name": "s", "base": "spec.yaml", "preset": "quick"}
    path.write_text(yaml.safe_dump(asked), encoding="utf-8")
    assert amounts(load_sweep(path)[0]).rungs == 1
    path.write_text(yaml.safe_dump({**asked, key: 2}), encoding="utf-8")
    with pytest.raises(TenureError, match="a trial of 2 workers trains in one go"):
        load_sweep(path)


def test_trials_that_claim_more_than_others_are_refused(tmp_path: Path) -> None:
    assert "all of them claim alike" in refused(tmp_path, space={"scaling.workers": [1, 2]})


def test_an_empty_space_is_refused(tmp_path: Path) -> None:
    assert "the space is empty" in refused(tmp_path)


@pytest.mark.parametrize(
    ("dimension", "reason"),
    [
        ({"low": 1.0, "high": 0.1}, "no number lies between"),
        ({"low": 0.0, "high": 0.1, "log": True}, "has no logarithm"),
        ({"low": 0.5, "high": 3, "integer": True}, "are whole"),
        ([], "nothing to choose from"),
    ],
)
def test_a_contradictory_range_is_refused(tmp_path: Path, dimension: Any, reason: str) -> None:
    assert reason in refused(tmp_path, space={"training.learning_rate": dimension})


def test_what_is_set_is_not_varied_too(tmp_path: Path) -> None:
    both = {**FULL, "set": {"training.learning_rate": 0.1}}
    assert "set to one value and varied" in refused(tmp_path, strategies=[both])
    assert "another in strategy" in refused(tmp_path, strategies=[FULL], space={"training.learning_rate": RATE})


def test_a_grid_of_a_million_points_asks_for_a_budget(tmp_path: Path) -> None:
    many = {"low": 1e-4, "high": 1e-2, "points": 1000}
    space = {"training.learning_rate": many, "training.weight_decay": {"low": 0.0, "high": 0.1, "points": 1000}}
    told = refused(tmp_path, space=space, search="grid")
    assert "1,000,000 points" in told
    assert "budget.trials" in told
    assert MOST_GRID_POINTS < 1_000_000


def test_a_strategy_that_no_run_can_have_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = {"name": "wrong", "tuning": {"type": "full"}, "space": {"tuning.rank": [4, 8]}}
    told = refused(tmp_path, strategies=[FULL, wrong])
    assert "no trial of this strategy can be valid" in told
    assert "strategy 'wrong'" in told
    lost = {"name": "lost", "tuning": {"type": "full"}, "space": {"protections.3.strength": [1.0]}}
    assert "leads nowhere" in refused(tmp_path, strategies=[lost])


def test_a_setting_becomes_its_run(tmp_path: Path) -> None:
    sweep, _ = read(tmp_path, strategies=[FULL, PULLED])
    spec = run_spec(sweep, Setting("pulled", {"protections.0.strength": 0.5}), seed=7)
    pull = spec.protection(L2sp)
    assert pull is not None
    assert (pull.strength, spec.training.seed, spec.tuning.type) == (0.5, 7, "full")


def test_draws_are_repeatable_and_take_turns(tmp_path: Path) -> None:
    sweep, _ = read(tmp_path, strategies=[FULL, PULLED], budget={"trials": 6})
    drawn = settings(sweep)
    assert [setting.strategy for setting in drawn] == ["full", "pulled"] * 3
    assert drawn == [draw(sweep, number) for number in range(6)]
    assert all(1e-4 <= float(str(s.values["training.learning_rate"])) <= 1e-2 for s in drawn if s.strategy == "full")


def test_a_grid_is_every_point_of_every_strategy(tmp_path: Path) -> None:
    lora = {
        "name": "lora",
        "tuning": {"type": "lora"},
        "space": {"tuning.rank": [4, 8], "training.learning_rate": RATE},
    }
    sweep, _ = read(tmp_path, strategies=[FULL, lora], search="grid")
    assert grid_size(sweep) == 3 + 2 * 3 == len(list(grid(sweep)))
    ranks = set()
    for setting in grid(sweep):
        tuning = run_spec(sweep, setting).tuning
        ranks |= {tuning.rank} if isinstance(tuning, Lora) else set()
    assert ranks == {4, 8}
