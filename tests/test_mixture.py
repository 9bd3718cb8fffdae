"""Several tasks in one run: how often each is seen, which rows a batch takes of it, and what is refused."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import STEPS, JobValues, losses, plan_of, run_of, spec_of, start_job, train_here, train_in_group, uneven_rows
from jobs import rows_of as metrics_of
from one_command import run_tenure
from tiny_spec import write_rows, write_tiny_spec
from torch.nn import functional

from training.data.batches import micro_batches, share
from training.data.encoding import Encoded
from training.data.mixture import Task, at_least, spread, tasks_of
from training.data.prepare import load_prepared
from training.data.schedule import Schedule, permuted, schedule_of
from training.data.seen import read_seen
from training.errors import TenureError
from training.reporting.curves import read_metrics, task_totals
from training.spec import Data
from training.specfile import load_spec
from training.tuning import load_base

SOURCE = {"path": "rows.jsonl", "prompt": "q", "completion": "a"}
BATCH = 16
Drawn = tuple[Data, tuple[int, ...]]


def data_of(sources: list[dict[str, Any]], **mixture: Any) -> Data:
    """A mixture of sources called a, b, c and so on."""
    named = [{**SOURCE, "name": chr(ord("a") + index), **source} for index, source in enumerate(sources)]
    return Data.model_validate({"train": named, "mixture": mixture or {"by": "size"}})


def schedule(data: Data, sizes: tuple[int, ...], **keys: Any) -> Schedule:
    assert data.mixture is not None
    tasks = tasks_of(data, sizes, BATCH)
    keys = {"epochs": 3, "seed": 0, **keys}
    return Schedule(sum(sizes), BATCH, tasks=tasks, minimum=data.mixture.minimum, **keys)


def counts(batch: list[int], tasks: tuple[Task, ...]) -> list[int]:
    """How many of a batch's rows are of each task."""
    return [sum(task.first <= index < task.first + task.size for index in batch) for task in tasks]


def rows_of(data: Data, *sizes: int, batch: int = BATCH) -> list[int]:
    return [task.rows for task in tasks_of(data, sizes, batch)]


@st.composite
def mixtures(draw: st.DrawFn) -> Drawn:
    """A mixture that can be mixed, of one to five tasks."""
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    by = draw(st.sampled_from(["size", "temperature", "weight"]))
    bounds = st.fixed_dictionaries(
        {"cap": st.none() | st.integers(1, 300), "repeats": st.integers(1, 4)},
        optional={"weight": st.floats(0.05, 20)} if by == "weight" else {},
    )
    sources = [draw(bounds) for _ in sizes]
    mixture = {"by": by, "minimum": draw(st.integers(0, BATCH // len(sizes)))}
    mixture |= {"temperature": draw(st.floats(0.3, 50))} if by == "temperature" else {}
    return data_of(sources, **mixture), tuple(sizes)


def mixable(drawn: Drawn) -> bool:
    try:
        return bool(tasks_of(*drawn, BATCH))
    except TenureError:
        return False


MIXTURES = mixtures().filter(mixable)


@settings(max_examples=30, deadline=None)
@given(MIXTURES)
def test_an_epoch_takes_no_example_more_often_than_asked_and_every_task_its_share(drawn: Drawn) -> None:
    data, sizes = drawn
    plan = schedule(data, sizes)
    steps = plan.steps_per_epoch
    orders = [[i for step in range(e * steps, (e + 1) * steps) for i in plan.batch(step)] for e in range(3)]
    for order in orders:
        seen = Counter(order)
        for task, source, realised in zip(plan.tasks, data.train, counts(order, plan.tasks), strict=True):
            assert max(seen[task.first + index] for index in range(task.size)) <= source.repeats
            assert realised == task.rows <= (source.cap or task.rows)
            assert abs(realised - task.asked * len(order)) < 1 + 1e-6
            assert len(order) < 100 or abs(realised / len(order) - task.asked) < 0.01
    assert sum(task.asked for task in plan.tasks) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(MIXTURES)
def test_every_batch_holds_the_minimum_and_about_every_tasks_share(drawn: Drawn) -> None:
    data, sizes = drawn
    plan = schedule(data, sizes)
    assert data.mixture is not None
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(step)
        assert len(batch) == BATCH or (step == plan.steps_per_epoch - 1 and not data.mixture.minimum)
        for task, number in zip(plan.tasks, counts(batch, plan.tasks), strict=True):
            assert number >= data.mixture.minimum
            assert abs(number - task.rows * len(batch) / plan.rows_per_epoch) <= 1 + len(sizes)


@settings(max_examples=20, deadline=None)
@given(MIXTURES, st.integers(0, 10**6), st.integers(0, 2**32))
def test_a_batch_is_the_same_from_any_start_and_at_any_world_size(drawn: Drawn, start: int, seed: int) -> None:
    whole = [schedule(*drawn, seed=seed).batch(step) for step in range(schedule(*drawn).num_steps)]
    start %= len(whole)
    resumed = schedule(*drawn, seed=seed)
    assert [resumed.batch(step) for step in range(start, len(whole))] == whole[start:]
    lengths = [1 + index * 7919 % 31 for index in range(sum(drawn[1]))]
    for workers in (1, 2, 4):
        cut = micro_batches(whole[start], lengths, 4, BATCH // 4)
        fed = [index for rank in range(workers) for batch in share(cut, rank, workers) for index in batch]
        assert sorted(fed) == sorted(whole[start])


@settings(max_examples=20, deadline=None)
@given(MIXTURES)
def test_tasks_take_turns_over_the_epochs(drawn: Drawn) -> None:
    """However little of a task an epoch takes, none of its examples lags behind another by more than a turn."""
    plan = schedule(*drawn, epochs=4)
    seen = Counter(index for step in range(plan.num_steps) for index in plan.batch(step))
    for task in plan.tasks:
        often = [seen[task.first + index] for index in range(task.size)]
        assert max(often) - min(often) <= 1


def test_the_order_is_new_each_epoch_and_by_seed() -> None:
    data = data_of([{}, {}])
    batches = [schedule(data, (60, 40), seed=seed).batch(step) for seed in (0, 1) for step in (0, 7, 14)]
    assert len({tuple(batch) for batch in batches}) == 6
    assert len({tuple(sorted(batch)) for batch in batches}) == 6


def test_by_size_an_epoch_is_every_example_once() -> None:
    plan = schedule(data_of([{}, {}, {}]), (70, 20, 11))
    order = [index for step in range(plan.steps_per_epoch) for index in plan.batch(step)]
    assert sorted(order) == list(range(101))
    assert order != sorted(order)


def test_rows_of_an_epoch_by_hand() -> None:
    assert rows_of(data_of([{}, {}]), 300, 100) == [300, 100]
    assert rows_of(data_of([{"weight": 1.0}, {"weight": 1.0}], by="weight"), 300, 100) == [100, 100]
    assert rows_of(data_of([{}, {"repeats": 3}], by="weight"), 300, 100) == [300, 300]
    assert rows_of(data_of([{"weight": 3.0}, {}], by="weight"), 300, 50) == [150, 50]
    assert rows_of(data_of([{}, {"cap": 20}], by="weight"), 300, 100) == [20, 20]
    assert rows_of(data_of([{"cap": 60}, {}]), 300, 20) == [60, 20]
    # Square roots of 400 and 100 are as 2 to 1: 100 of the small one allow 200 of the large one.
    assert rows_of(data_of([{}, {}], by="temperature", temperature=2.0), 400, 100) == [200, 100]
    assert rows_of(data_of([{}, {}], by="temperature", temperature=1.0), 400, 100) == [400, 100]
    # A tenth of a percent is lifted to 2 of 16 rows: 16 rows allow 8 batches.
    assert rows_of(data_of([{}, {}], by="size", minimum=2), 16000, 16) == [112, 16]


def test_a_minimum_takes_from_the_others_in_proportion() -> None:
    assert at_least([0.5, 0.3, 0.2], 0.1) == [0.5, 0.3, 0.2]
    assert at_least([0.6, 0.3, 0.1], 0.25) == pytest.approx([0.5, 0.25, 0.25])
    assert at_least([0.9, 0.08, 0.02], 1 / 3) == pytest.approx([1 / 3] * 3)
    # What is given may itself fall below: 0.26 gives to 0.01 and needs some back.
    assert at_least([0.73, 0.26, 0.01], 0.25) == pytest.approx([0.5, 0.25, 0.25])


def test_rows_spread_evenly_and_only_ever_come_on_top() -> None:
    rows = [7, 3, 1, 13]
    taken = [spread(rows, places) for places in range(25)]
    assert [sum(row) for row in taken] == list(range(25))
    assert (taken[0], taken[-1]) == ([0] * 4, rows)
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(taken)]
    assert all(sorted(step) == [0, 0, 0, 1] for step in steps)
    assert all(abs(row[3] - places * 13 / 24) < 1.2 for places, row in enumerate(taken))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.text(max_size=5))
def test_a_permutation_is_one_and_differs_by_name(count: int, name: str) -> None:
    found = permuted(np.arange(count), count, name)
    assert sorted(found.tolist()) == list(range(count))
    assert count < 8 or found.tolist() != permuted(np.arange(count), count, f"{name}x").tolist()


def test_permutations_are_not_biased() -> None:
    """Of 60 rows, where any ten go first: no row and no neighbour is preferred (chi-square, 59 degrees of freedom)."""
    firsts = Counter(int(i) for name in range(3000) for i in permuted(np.arange(10), 60, str(name)))
    assert sum((firsts[row] - 500) ** 2 / 500 for row in range(60)) < 120
    gaps = Counter(int(np.diff(permuted(np.arange(2), 60, str(name)))[0]) % 60 for name in range(3000))
    assert gaps[0] == 0
    assert sum((gaps[gap] - 3000 / 59) ** 2 / (3000 / 59) for gap in range(1, 60)) < 120


def test_ten_million_rows_are_drawn_without_a_list_of_them() -> None:
    tasks = (Task("a", 0, 9_000_000, 9_000_000, 0.9), Task("b", 9_000_000, 1_000_000, 1_000_000, 0.1))
    plan = Schedule(10_000_000, 1000, epochs=2, seed=0, tasks=tasks)
    seen = [index for step in random.Random(0).sample(range(20_000), 50) for index in plan.batch(step)]
    assert len(seen) == 50_000
    assert counts(seen, tasks) == [45_000, 5_000]


def test_named_sources_without_a_mixture_are_tasks_of_a_plain_run() -> None:
    data = Data.model_validate({"train": [{**SOURCE, "name": "a"}, SOURCE]})
    assert [(task.name, task.first, task.rows) for task in tasks_of(data, (30, 10), 8)] == [
        ("a", 0, 30),
        ("rows", 30, 10),
    ]
    assert tasks_of(Data.model_validate({"train": [SOURCE]}), (30,), 8) == ()


def test_a_task_without_rows_and_one_too_small_are_refused() -> None:
    with pytest.raises(TenureError) as caught:
        rows_of(data_of([{}, {}, {}]), 0, 10, 0)
    assert [str(problem).splitlines()[0] for problem in caught.value.problems] == [
        "data.train[0]: task 'a' has no rows",
        "data.train[2]: task 'c' has no rows",
    ]
    with pytest.raises(TenureError, match="task 'b' has 3 rows an epoch, too few for one batch"):
        rows_of(data_of([{}, {}], by="size", minimum=4), 100, 3)
    with pytest.raises(TenureError, match=r"task 'b' is asked for 0\.010% of an epoch of 100 rows"):
        rows_of(data_of([{"weight": 9999.0}, {}], by="weight"), 100, 100)


def test_a_folders_name_is_a_task_too(tmp_path: Path) -> None:
    data = Data.model_validate({"train": [{**SOURCE, "path": str(tmp_path / "sums.jsonl")}], "mixture": {"by": "size"}})
    assert data.train[0].task == "sums"


# ------------------------------------------------------------------------------------------------- on the real path


def sources_of(folder: Path, **keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Two tasks of 30 and 15 rows in `folder`, which a tiny model can read."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = uneven_rows(45)
    write_rows(folder / "short.jsonl", rows[:30])
    write_rows(folder / "long.jsonl", rows[30:])
    columns = {"prompt": "question", "completion": "answer"}
    return [{"name": n, "path": f"{n}.jsonl", **columns, **keys.get(n, {})} for n in ("short", "long")]


def task_job(folder: Path, model: Path, **keys: Any) -> JobValues:
    """A run over two tasks that stays at the base model: its losses are those of the base."""
    data = {"train": sources_of(folder, short={"weight": 3.0}), "mixture": {"by": "weight"}}
    training = STEPS | {"epochs": 2, "learning_rate": 1e-9, "log_examples": True, **keys.pop("training", {})}
    return start_job(folder, model, training=training, amend={"data": data}, **keys)


def expect_task_losses(job: JobValues, model: Path) -> None:
    """Every task's loss is the mean over its target tokens, example by example from a bare model."""
    data, bare = load_prepared(Path(job["prepared"])), load_base(model, torch.float32)
    schedule = schedule_of(spec_of(job), data.sizes, 0, 0)
    steps = [row for row in metrics_of(run_of(job)) if row["kind"] == "step"]
    assert [row["num_rows"] for row in steps] == [8, 8, 8, 8, 8] * 2
    for row in steps[:3]:
        batch = schedule.batch(row["step"] - 1)
        for name, inside in (("short", [i for i in batch if i < 30]), ("long", [i for i in batch if i >= 30])):
            nats, targets = zip(*(nats_of(bare, data.train[i]) for i in inside), strict=True)
            found = row["tasks"][name]
            assert (found["num_rows"], found["num_target_tokens"]) == (len(inside), sum(targets))
            assert found["loss"] == pytest.approx(sum(nats) / sum(targets), rel=1e-4)
    metrics = read_metrics(run_of(job).metrics)
    assert metrics is not None
    shares = {task.name: task.row_share for task in task_totals(metrics)}
    assert shares == pytest.approx({"short": 0.75, "long": 0.25})
    assert read_seen(run_of(job).examples) == {s + 1: sorted(schedule.batch(s)) for s in range(10)}


@pytest.mark.parametrize("packing", [False, True])
def test_the_losses_of_tasks_are_means_over_their_target_tokens(
    one_process: None, tiny_model: Path, tmp_path: Path, packing: bool
) -> None:
    job = task_job(tmp_path / "job", tiny_model, training={"packing": packing, "max_length": 96})
    assert bool(plan_of(job).row_tokens) == packing
    train_here(job)
    expect_task_losses(job, tiny_model)


def test_the_losses_of_tasks_are_whole_on_two_workers(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """Each worker adds up its own examples' losses; what is logged is of all, packed or not."""
    training = [{"packing": packing, "max_length": 96} for packing in (False, True)]
    jobs = [task_job(tmp_path / str(n), tiny_model, training=one, workers=2) for n, one in enumerate(training)]
    train_in_group(jobs, 2, tmp_path / "ray")
    for job in jobs:
        expect_task_losses(job, tiny_model)
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), abs=1e-5)


@torch.no_grad()
def nats_of(model: Any, row: Encoded) -> tuple[float, int]:
    logits, ids = model(torch.tensor([row.ids])).logits[0], torch.tensor(row.ids)
    wanted = torch.tensor(row.is_target)[1:]
    return functional.cross_entropy(logits[:-1][wanted], ids[1:][wanted], reduction="sum").item(), int(wanted.sum())


def test_check_tells_rows_and_shares(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tiny_model)
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec["data"] = {"train": sources_of(tmp_path, long={"repeats": 2}), "mixture": {"by": "weight"}}
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    told = " ".join(run_tenure(tmp_path, "check", path.name).stdout.split())
    assert "short: 30 rows an epoch of 30 examples, 50.0% of the rows (50.0% asked for)" in told
    assert "long: 30 rows an epoch of 15 examples, 50.0% of the rows (50.0% asked for)" in told


GOOD = {"name": "short", "path": "rows.jsonl", "prompt": "q", "completion": "a"}
OTHER = {**GOOD, "name": "long"}
WEIGHTS = {"by": "weight"}


@pytest.mark.parametrize(
    ("sources", "mixture", "training", "told"),
    [
        ([{**GOOD, "weight": 0.0}, OTHER], WEIGHTS, {}, "data.train[0].weight: 0.0 is not a number above 0"),
        ([GOOD, {**OTHER, "weight": -1.0}], WEIGHTS, {}, "data.train[1].weight: -1.0 is not a number above 0"),
        ([{**GOOD, "cap": 0}], WEIGHTS, {}, "data.train[0].cap: 0 is not a whole number of at least 1"),
        ([{**GOOD, "repeats": 0}], WEIGHTS, {}, "data.train[0].repeats: 0 is not a whole number of at least 1"),
        ([GOOD, GOOD], WEIGHTS, {}, "data.train[1].name: two tasks are called 'short'"),
        ([GOOD, GOOD], None, {}, "data.train[1].name: two tasks are called 'short'"),
        ([{**GOOD, "weight": 2.0}], None, {}, "data.train[0].weight: weight needs a mixture"),
        ([{**GOOD, "cap": 5}], None, {}, "data.train[0].cap: cap needs a mixture"),
        (
            [{**GOOD, "weight": 2.0}],
            {"by": "size"},
            {},
            "data.train[0].weight: a weight means nothing with data.mixture.by: size",
        ),
        (
            [GOOD],
            {"by": "temperature", "temperature": 0.0},
            {},
            "data.mixture.temperature: 0.0 is not a number above 0",
        ),
        ([GOOD], {"by": "temperature"}, {}, "data.mixture: by: temperature needs one"),
        (
            [GOOD],
            {"by": "size", "temperature": 2.0},
            {},
            "data.mixture.temperature: a temperature means nothing with by: size",
        ),
        ([GOOD], {"by": "sise"}, {}, "data.mixture.by: 'sise' is not known here"),
        (
            [GOOD, OTHER],
            {"by": "size", "minimum": 5},
            {"global_batch_size": 8},
            "training.global_batch_size: data.mixture.minimum: 5 of each of 2 tasks makes 10 rows, and a global batch has 8",  # noqa: E501
        ),
    ],
)
def test_bad_mixtures_are_refused_with_the_key_and_the_fix(
    tmp_path: Path, sources: list[Any], mixture: Any, training: dict[str, Any], told: str
) -> None:
    path = write_tiny_spec(tmp_path, tmp_path, training=training)
    write_rows(tmp_path / "rows.jsonl", [{"q": "1", "a": "2"}])
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec["data"] = {"train": sources, **({"mixture": mixture} if mixture else {})}
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    with pytest.raises(TenureError) as caught:
        load_spec(path)
    (problem,) = caught.value.problems
    assert re.sub(r"^.*?spec\.yaml:\d+: ", "", f"{problem.where}: {problem.what}") == told
    assert problem.instead


def test_replay_and_a_mixture_share_a_batch() -> None:
    tasks = (Task("a", 0, 30, 30, 0.6), Task("b", 30, 20, 20, 0.4))
    plan = Schedule(50, 13, epochs=2, seed=0, num_replay=7, replay_per_batch=3, tasks=tasks)
    batches = [plan.batch(step) for step in range(plan.num_steps)]
    assert plan.num_steps == 10
    assert [(*counts(batch, tasks), sum(index >= 50 for index in batch)) for batch in batches] == [(6, 4, 3)] * 10
