"""What a run does after each kind of failure, with a cluster and a training that are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_spec import write_tiny_spec

from training import attempts
from training.attempts import Hands, train_to_the_end
from training.errors import Left, OutOfMemory, Problem, StorageFault, TenureError, WorkerLost
from training.events import read_events
from training.plan import Plan
from training.retries import smaller_micro_batch, worker_counts
from training.spec import RunSpec, Scaling
from training.specfile import load_spec
from training.workspace import RunFolder

EMPTY: dict[str, Any] = {**dict.fromkeys(Plan.__dataclass_fields__, 0), "tasks": ()}


def spec_with(tmp_path: Path, scaling: dict[str, Any], training: dict[str, Any] | None = None) -> RunSpec:
    """Global batches of 24 rows."""
    model = Path("/models/tiny")
    path = write_tiny_spec(
        tmp_path / "spec", model, scaling=scaling, training={"global_batch_size": 24, **(training or {})}
    )
    return load_spec(path, look_at_files=False)


def plan_with(workers: int, micro: int | None) -> Plan:
    rows = micro or 24 // workers
    return Plan(**{**EMPTY, "workers": workers, "micro_batch_size": rows, "global_batch_size": 24, "zero_stage": 1})


class Cluster:
    """Attempts end as they are told to, one after another; every wait makes room as it is told to."""

    def __init__(self, *ends: Exception | Callable[[], Any] | None, rooms: tuple[int, ...] = (99,)) -> None:
        self.ends, self.rooms = list(ends), list(rooms)
        self.plans: list[tuple[int, int]] = []
        self.waits: list[float] = []
        self.told: list[str] = []

    def train(self, plan: Plan, scaling: Scaling) -> None:
        assert scaling.workers == plan.workers
        self.plans.append((plan.workers, plan.micro_batch_size))
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        if end:
            end()

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.rooms) > 1:
            self.rooms.pop(0)

    @property
    def hands(self) -> Hands:
        return Hands(plan_with, self.train, lambda _: self.rooms[0], self.told.append, self.sleep)


def lost() -> WorkerLost:
    return WorkerLost(Problem("a worker failed: gone"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return RunFolder(tmp_path / "run")


def events_of(run: RunFolder) -> list[str]:
    return [event["event"] for event in read_events(run)]


def test_a_lost_worker_is_waited_for_twice_as_long_every_time(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(lost(), lost(), lost(), None)
    train_to_the_end(run, spec_with(tmp_path, {"workers": 2, "max_failures": 3}), plan_with(2, 4), cluster.hands)
    assert cluster.plans == [(2, 4)] * 4
    assert cluster.waits == [2, 4, 8]
    assert events_of(run) == ["attempt", "failure"] * 3 + ["attempt", "trained"]
    assert [event.get("cause") for event in read_events(run) if event["event"] == "failure"] == ["lost"] * 3


def test_failures_above_the_budget_are_told(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(lost(), lost())
    with pytest.raises(WorkerLost, match="gone"):
        train_to_the_end(run, spec_with(tmp_path, {"max_failures": 1}), plan_with(1, 4), cluster.hands)
    assert events_of(run) == ["attempt", "failure", "attempt", "failed"]


def test_what_would_come_again_is_not_tried_again(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(TenureError(Problem("the loss is not a finite number at step 3")))
    with pytest.raises(TenureError, match="finite"):
        train_to_the_end(run, spec_with(tmp_path, {"max_failures": 9}), plan_with(1, 4), cluster.hands)
    assert cluster.waits == []


def test_storage_is_waited_for_longer(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(StorageFault(Problem("the share is gone")), StorageFault(Problem("still")), None)
    train_to_the_end(run, spec_with(tmp_path, {"max_failures": 2}), plan_with(1, 4), cluster.hands)
    assert cluster.waits == [30, 60]


def test_a_hang_is_told_from_a_loss_by_its_stacks(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(None, None)

    def hangs() -> None:
        (run.logs / "stacks-0.txt").write_text("Thread 0x1\n", encoding="utf-8")
        raise lost()

    cluster.ends = [hangs, lost(), None]
    train_to_the_end(run, spec_with(tmp_path, {"max_failures": 2}), plan_with(1, 4), cluster.hands)
    causes = [event.get("cause") for event in read_events(run) if event["event"] == "failure"]
    assert causes[0] == "hang"
    assert "stacks" in cluster.told[0]


def test_out_of_memory_makes_micro_batches_smaller_without_a_budget(tmp_path: Path, run: RunFolder) -> None:
    full = OutOfMemory(Problem("CUDA out of memory"))
    cluster = Cluster(full, full, None)
    train_to_the_end(run, spec_with(tmp_path, {"workers": 2}), plan_with(2, 12), cluster.hands)
    assert cluster.plans == [(2, 12), (2, 6), (2, 4)], "each divides the 12 rows of a worker"
    cluster = Cluster(full)
    with pytest.raises(OutOfMemory):
        train_to_the_end(run, spec_with(tmp_path, {"max_failures": 5}), plan_with(1, 1), cluster.hands)


def test_a_given_micro_batch_stays(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, {"workers": 2}, {"micro_batch_size": 4})
    assert smaller_micro_batch(spec, plan_with(2, 4)) is None
    packed = replace(plan_with(2, 5), row_tokens=1024)
    assert smaller_micro_batch(spec_with(tmp_path, {"workers": 2}), packed) == 2


def test_an_elastic_run_goes_on_with_what_is_left(tmp_path: Path, run: RunFolder) -> None:
    """Five of the workers would not divide the global batch of 24."""
    spec = spec_with(tmp_path, {"workers": 6, "min_workers": 2, "max_failures": 1})
    assert worker_counts(spec) == [6, 4, 3, 2]
    cluster = Cluster(lost(), None, rooms=(6, 5))
    train_to_the_end(run, spec, plan_with(6, 4), cluster.hands)
    assert [workers for workers, _ in cluster.plans] == [6, 4]


def test_an_elastic_run_asks_for_the_fewest_where_there_is_no_room(tmp_path: Path, run: RunFolder) -> None:
    """A cluster that grows by itself would never have room for what nobody asks for."""
    spec = spec_with(tmp_path, {"workers": 4, "min_workers": 2})
    cluster = Cluster(None, rooms=(0,))
    train_to_the_end(run, spec, plan_with(4, 6), cluster.hands)
    assert cluster.told == ["there is room for 0 workers; asking for 2"]
    assert [workers for workers, _ in cluster.plans] == [2]


def test_an_elastic_run_takes_what_comes_free_while_it_settles(tmp_path: Path, run: RunFolder) -> None:
    spec = spec_with(tmp_path, {"workers": 4, "min_workers": 2})
    cluster = Cluster(None, rooms=(1, 1, 3))
    train_to_the_end(run, spec, plan_with(4, 6), cluster.hands)
    assert [workers for workers, _ in cluster.plans] == [3]


def test_a_run_that_may_grow_leaves_and_goes_on_with_more(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(attempts, "_GROW_AFTER_S", 0.0)
    spec = spec_with(tmp_path, {"workers": 4, "min_workers": 2})
    cluster = Cluster(rooms=(2,))

    def until_asked() -> None:
        while not run.notice.exists():
            pass
        cluster.rooms = [4]
        raise Left(Problem("left"))

    cluster.ends = [until_asked, None]
    train_to_the_end(run, spec, plan_with(4, 6), cluster.hands)
    assert [workers for workers, _ in cluster.plans] == [2, 4]
    assert not run.notice.exists()
    assert events_of(run) == ["attempt", "resize", "attempt", "trained"]


def test_a_run_that_was_asked_to_leave_leaves(tmp_path: Path, run: RunFolder) -> None:
    cluster = Cluster(Left(Problem("the run was asked to leave")))
    with pytest.raises(Left):
        train_to_the_end(run, spec_with(tmp_path, {"max_failures": 3}), plan_with(1, 4), cluster.hands)
    assert events_of(run) == ["attempt", "left"]


def test_the_fewest_workers_are_not_more_than_the_most() -> None:
    with pytest.raises(ValidationError, match="is more than workers"):
        Scaling(workers=2, min_workers=3)
