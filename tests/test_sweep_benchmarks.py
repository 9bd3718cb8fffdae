"""The arithmetic of the benchmarks of sweeps, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sweep_results import made_up_sweep, measured

from benchmarks.retention.run import _keep
from benchmarks.sweep_overhead import INTERRUPTED, breakdown, limited
from benchmarks.sweep_quick import told
from benchmarks.sweep_search import compared
from benchmarks.sweep_search import told as told_of_both
from sweeps.folder import Record
from training.workspace import read_json


def test_the_breakdown_adds_up_to_the_time_that_was_held() -> None:
    """100 s, two side by side: 200 s held, of which 120 + 40 went into steps and scoring."""
    found = breakdown(100.0, 2, [{"steps": 70.0, "scoring": 40.0, "setup": 10.0}, {"steps": 50.0}])
    assert found["seconds"] == {"steps": 120.0, "scoring": 40.0, "setup": 10.0, "rest": 30.0}
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert found["useful_share"] == pytest.approx(0.8)


def test_the_time_to_what_random_search_reached_in_the_end() -> None:
    """Random search came to 0.4 at 90 s of 100; ours was at 0.5 after 30 s."""
    found = compared([(10.0, 0.3), (30.0, 0.5)], [(50.0, 0.2), (90.0, 0.4)], 100.0)
    assert found["reached_at"] == 30.0
    assert found["share_of_budget"] == pytest.approx(0.3)
    assert found["share_of_randoms_time"] == pytest.approx(1 / 3)
    assert compared([(10.0, 0.3)], [(90.0, 0.4)], 100.0)["reached_at"] is None
    assert compared([(10.0, 0.3)], [], 100.0)["reached_at"] is None


def test_a_search_that_is_cut_short_tells_what_it_has() -> None:
    """No random run yet; then one that failed and one that came to 0.4 by 0.5 = 0.2 at 90 s, reached at 30 s."""
    halving = {"wall_seconds": 40.0, "trials": 2, "points": [(10.0, None, (0.1, 1.0)), (30.0, 0.5, (0.3, 1.0))]}
    first = told_of_both(halving, [], 100.0, whole=False)
    assert (first["whole"], first["random"]["trials"]) == (False, 0)
    assert first["asha_against_random"]["share_of_randoms_time"] is None
    found = told_of_both(halving, [None, (90.0, (0.4, 0.5))], 100.0, whole=True)
    assert (found["random"]["trials"], found["random"]["points"]) == (2, 1)
    assert found["asha_against_random"]["share_of_randoms_time"] == pytest.approx(1 / 3)
    assert found["asha_without_wise_against_random"]["reached_at"] is None


def test_what_takes_longer_than_its_limit_is_interrupted(tmp_path: Path) -> None:
    """By ctrl-c, which it may answer; one that answers nothing is killed."""
    answers = "import time, pathlib\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n pathlib.Path('told').touch()"
    assert limited([sys.executable, "-c", answers], 2.0, cwd=tmp_path) == INTERRUPTED
    assert (tmp_path / "told").exists()
    assert limited([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == 3


def test_the_quick_sweep_names_who_stands_on_its_front() -> None:
    """Of two points one dominates the other; the seconds of all records are added up by part."""
    sweep = made_up_sweep(2)
    best, worse = (
        sweep.points[0].model_copy(update={"strategy": name, "gain": measured(gain), "retention": measured(1.0)})
        for name, gain in (("lora", 0.9), ("full", 0.8))
    )
    records = [
        Record(trial=sweep.trials[0], timings={"steps": 2.0}),
        Record(trial=sweep.trials[1], timings={"steps": 3.0}),
    ]
    found = told(sweep.model_copy(update={"points": (best, worse)}), records)
    assert found["strategies_on_the_front"] == ["lora"]
    assert found["hypervolume"] == pytest.approx(0.9)
    assert found["seconds"] == {"steps": 5.0}


def test_a_pair_of_skills_is_told_beside_those_before(tmp_path: Path) -> None:
    """One that is measured again takes the place of its own figures alone."""
    for pair, seconds in (("first", 1), ("second", 2), ("first", 3)):
        _keep(tmp_path / "figures.json", pair, {"seconds": seconds})
    pairs = read_json(tmp_path / "figures.json")["pairs"]
    assert {pair: figures["seconds"] for pair, figures in pairs.items()} == {"first": 3, "second": 2}
