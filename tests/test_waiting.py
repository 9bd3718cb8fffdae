"""What is told of a run that waits for room, with a cluster that is a stand-in."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from training.fit import free_groups
from training.waiting import WAITING, is_pending, room_of, wait_in, waits_told

ONE = {"CPU": 1.0}
EVERY_S = 0.01


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(EVERY_S)


def test_a_wait_is_told_once_and_so_is_its_end() -> None:
    told: list[str] = []
    asked: list[dict[str, float]] = []
    waits = True

    def pending(wants: dict[str, float]) -> bool:
        asked.append(wants)
        return waits

    with waits_told(ONE, 2, told.append, pending, lambda _: 0, EVERY_S):
        until(lambda: len(asked) > 5)
        assert told == [f"{WAITING}: 2 processes of 1 CPU wanted, room for 0"]
        waits = False
        until(lambda: len(told) == 2)
    assert told[1:] == ["there is room now"]
    assert ONE in asked


def test_what_is_placed_soon_is_not_told_of() -> None:
    told: list[str] = []
    looks = iter([True, False, True, False])

    with waits_told(ONE, 1, told.append, lambda _: next(looks, False), lambda _: 0, EVERY_S):
        until(lambda: next(looks, None) is None)
    assert told == []


def test_a_real_ray_tells_what_it_could_not_place(ray_cluster: None) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    assert not is_pending(ONE)
    hold = placement_group([{"CPU": 4.0}])
    ray.get(hold.ready(), timeout=60)
    assert room_of(ONE) == 0
    late = placement_group([ONE] * 2)
    until(lambda: is_pending({"CPU": 3.0}))
    remove_placement_group(hold)
    ray.get(late.ready(), timeout=60)
    until(lambda: not is_pending({"CPU": 3.0}))
    assert room_of(ONE) == 2
    free_groups()
    until(lambda: room_of(ONE) == 4)


@pytest.mark.parametrize(
    ("said", "waits"),
    [
        ("", ""),
        ("training on 2 workers\n", ""),
        (f"scoring the base\n{WAITING}: 1 process\n\n", f"{WAITING}: 1 process"),
        (f"{WAITING}: 1 process\nthere is room now\n", ""),
    ],
)
def test_a_run_waits_if_that_is_the_last_it_said(said: str, waits: str) -> None:
    assert wait_in(said) == waits
