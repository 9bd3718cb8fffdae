"""The arithmetic of the benchmarks of sweeps, by hand."""

from __future__ import annotations

import pytest

from benchmarks.sweep_overhead import breakdown
from benchmarks.sweep_search import compared


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
