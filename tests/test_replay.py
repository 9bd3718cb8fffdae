"""Replay: which rows a batch replays, what they do to the loss, and how they are read, planned and told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    STEPS,
    JobValues,
    losses,
    plan_of,
    rows_of,
    run_of,
    spec_of,
    start_job,
    train_here,
    train_in_group,
    weights,
)
from one_command import run_tenure
from rich.console import Console
from tiny_spec import write_rows, write_tiny_spec
from torch.nn import functional

from cluster.pipeline import read_spec
from training.aids import ready_data
from training.data.batches import Schedule, micro_batches, share
from training.data.encoding import Encoded
from training.data.prepare import TOLD, Prepared, load_prepared, prepare
from training.data.store import META, RowWriter, write_meta
from training.errors import TenureError
from training.plan import describe_replay
from training.reporting.curves import cost_rows, read_metrics
from training.specfile import load_spec
from training.stages import plan_run
from training.tuning import apply_tuning, load_base
from training.worker import seed_everything
from training.workspace import Workspace, read_json

FACTS = [{"q": f"recall {index}", "a": "x" * (1 + index % 9)} for index in range(11)]


def replay_of(folder: Path, rows: list[dict[str, Any]] | None = None, **keys: Any) -> list[dict[str, Any]]:
    """The protection, over a file of facts in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_rows(folder / "facts.jsonl", FACTS if rows is None else rows)
    source = {"path": str(path), "prompt": "q", "completion": "a"}
    return [{"type": "replay", "share": 0.25, "data": [source], **keys}]


# ------------------------------------------------------------------------------------------------ schedule

SCHEDULE = Schedule(20, 8, epochs=4, seed=0, num_replay=11, replay_per_batch=3)


def replayed(schedule: Schedule) -> list[list[int]]:
    batches = [schedule.batch(step) for step in range(schedule.num_steps)]
    return [[index - schedule.num_examples for index in batch if index >= schedule.num_examples] for batch in batches]


def test_every_batch_replays_its_rows_and_an_epoch_is_still_a_pass_over_the_training_rows() -> None:
    assert (SCHEDULE.steps_per_epoch, SCHEDULE.num_steps) == (4, 16)
    assert [len(batch) for batch in replayed(SCHEDULE)] == [3] * 16
    assert [len(SCHEDULE.batch(step)) for step in range(8)] == [8, 8, 8, 8] * 2
    for start in range(0, 16, 4):
        seen = [index for step in range(start, start + 4) for index in SCHEDULE.batch(step) if index < 20]
        assert sorted(seen) == list(range(20))


def test_no_row_is_replayed_twice_in_a_pass_and_passes_differ() -> None:
    drawn = [index for batch in replayed(SCHEDULE) for index in batch]
    passes = [drawn[start : start + 11] for start in range(0, 44, 11)]
    assert [sorted(one) for one in passes] == [list(range(11))] * 4
    assert len({tuple(one) for one in passes}) == 4


def test_more_rows_a_batch_than_there_are_to_replay() -> None:
    schedule = Schedule(4, 8, epochs=1, seed=0, num_replay=2, replay_per_batch=5)
    batches = replayed(schedule)
    assert [sorted(Counter(batch).values()) for batch in batches] == [[2, 3], [2, 3]]
    assert Counter(index for batch in batches for index in batch) == Counter({0: 5, 1: 5})


def test_training_rows_keep_their_order_and_replay_its_own() -> None:
    other = Schedule(20, 8, epochs=4, seed=0, num_replay=5, replay_per_batch=3)
    train = [[index for index in s.batch(step) if index < 20] for s in (SCHEDULE, other) for step in range(16)]
    assert train[:16] == train[16:]
    assert replayed(Schedule(50, 8, epochs=2, seed=0, num_replay=11, replay_per_batch=3))[:16] == replayed(SCHEDULE)
    assert replayed(Schedule(20, 8, epochs=4, seed=1, num_replay=11, replay_per_batch=3)) != replayed(SCHEDULE)


def test_any_step_is_the_same_asked_alone_and_for_any_number_of_workers() -> None:
    whole = [SCHEDULE.batch(step) for step in range(16)]
    assert [SCHEDULE.batch(step) for step in reversed(range(16))] == whole[::-1]
    lengths = [index * 7919 % 31 for index in range(31)]
    for batch in whole:
        cut = micro_batches(batch, lengths, 2, 4)
        for workers in (1, 2, 4):
            dealt = [part for rank in range(workers) for part in share(cut, rank, workers)]
            assert sorted(dealt) == sorted(cut)
        assert Counter(index for part in cut for index in part) == Counter(batch)


def test_without_replay_nothing_changes() -> None:
    assert all(max(Schedule(20, 8, epochs=1, seed=0).batch(step)) < 20 for step in range(3))


# ------------------------------------------------------------------------------------------- data and plan


def test_replay_rows_stand_behind_the_training_rows(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tiny_model, protections=replay_of(tmp_path))
    workspace = Workspace.at(tmp_path / "workspace")
    plan, prepared = plan_run(read_spec(path, workspace), workspace)
    data = load_prepared(prepared)
    assert (len(data.train), len(data.replay)) == (48, 11)
    assert list(data.examples) == [*data.train, *data.replay]
    assert [example.num_targets for example in data.replay] == [2 + index % 9 for index in range(11)]
    assert (plan.num_examples, plan.num_replay, plan.replay_per_batch) == (48, 11, 2)
    assert (plan.steps_per_epoch, plan.steps) == (8, 8)
    expected = 8 * 2 * sum(example.num_targets for example in data.replay) / 11
    assert plan.replay_token_share == pytest.approx(expected / (expected + sum(e.num_targets for e in data.train)))


def test_plain_text_can_be_replayed_beside_completions(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"body": "the cat"}, {"body": "x" * 100}])
    source = {"path": str(path), "text": "body"}
    spec = load_spec(write_tiny_spec(tmp_path, tiny_model, protections=replay_of(tmp_path, data=[source])))
    data = load_prepared(prepare(spec, Workspace.at(tmp_path / "workspace")))
    assert [example.num_targets for example in data.replay] == [7, 63, 37], "all but the first token, in pieces of 64"
    assert all(sum(example.is_target) == len(example.ids) - 1 for example in data.replay)


def test_replayed_files_and_columns_make_another_file_and_the_share_does_not(tiny_model: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")

    def prepared(protections: list[dict[str, Any]]) -> Path:
        return prepare(load_spec(write_tiny_spec(tmp_path, tiny_model, protections=protections)), workspace)

    first = prepared(replay_of(tmp_path))
    assert prepared(replay_of(tmp_path, share=0.5)) == first
    swapped = [{"path": str(tmp_path / "facts.jsonl"), "prompt": "a", "completion": "q"}]
    others = [prepared([]), prepared(replay_of(tmp_path, data=swapped)), prepared(replay_of(tmp_path, FACTS[1:]))]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("asked", "rows", "told"),
    [
        (0.25, 2, "2 of 8 rows a batch (25.0%; 25.0% asked for), about"),
        (0.01, 1, "1 of 8 rows a batch (12.5%; 1.0% asked for, which rounds to 0 rows), about"),
        (0.99, 7, "7 of 8 rows a batch (87.5%; 99.0% asked for, which rounds to 8 rows), about"),
    ],
)
def test_the_share_is_rounded_aloud(tiny_model: Path, tmp_path: Path, asked: float, rows: int, told: str) -> None:
    path = write_tiny_spec(tmp_path, tiny_model, protections=replay_of(tmp_path, share=asked))
    workspace = Workspace.at(tmp_path / "workspace")
    plan, _ = plan_run(read_spec(path, workspace), workspace)
    assert plan.replay_per_batch == rows
    assert describe_replay(plan, asked).startswith(told)
    assert plan.steps_per_epoch == -(-48 // (8 - rows))


def test_check_shows_the_planned_shares(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_spec(tmp_path, tiny_model, protections=replay_of(tmp_path))
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    told = " ".join(done.stdout.split())
    assert "replay 2 of 8 rows a batch (25.0%; 25.0% asked for), about" in told
    assert "of the target tokens, from 11 rows" in told
    assert "8 (8 an epoch)" in done.stdout


# ----------------------------------------------------------------------------------------------- bad input


def faults(folder: Path, model: Path, protections: list[dict[str, Any]], **sections: Any) -> str:
    """What a spec, or its data, is refused with."""
    path = write_tiny_spec(folder, model, protections=protections, **sections)
    with pytest.raises(TenureError) as caught:
        prepare(load_spec(path, find_model=lambda name: Path(name)), Workspace.at(folder / "workspace"))
    return str(caught.value)


def test_bad_replay_is_refused_with_where_and_why(tiny_model: Path, tmp_path: Path) -> None:
    def told(protection: dict[str, Any], **sections: Any) -> str:
        return faults(tmp_path, tiny_model, [protection], **sections)

    (good,) = replay_of(tmp_path)
    assert "replay needs rows to replay" in told({"type": "replay"})
    missing = {"path": "nowhere.jsonl", "prompt": "q", "completion": "a"}
    assert "there is no file" in told(good | {"data": [missing]})
    assert "share" in told(good | {"share": 1.0})
    pairs = {"path": "facts.jsonl", "prompt": "q", "chosen": "a", "rejected": "q"}
    assert "rows of the form preference cannot be replayed" in told(good | {"data": [pairs]})
    assert "no column 'nothing'" in told(good | {"data": [good["data"][0] | {"completion": "nothing"}]})
    alone = {"training": {"global_batch_size": 1}}
    assert "a global batch of one row has no room for a replayed one" in told(good, **alone)
    assert "replay is listed twice" in faults(tmp_path, tiny_model, [good, good])


def test_overlong_replay_rows_are_treated_as_training_rows_are(tiny_model: Path, tmp_path: Path) -> None:
    long = [{"q": "recall", "a": "x" * 80}]
    told = faults(tmp_path, tiny_model, replay_of(tmp_path, FACTS + long))
    assert "1 rows are longer than max_length 64" in told
    assert "facts.jsonl row 12" in told
    path = write_tiny_spec(tmp_path, tiny_model, protections=replay_of(tmp_path, long))
    path.write_text(path.read_text().replace("\ndata:\n", "\ndata:\n  overlong: drop\n"))
    with pytest.raises(TenureError, match="no row is left to replay"):
        prepare(load_spec(path), Workspace.at(tmp_path / "workspace"))


# ------------------------------------------------------------------------------------------------ training

# Eight steps an epoch: 45 rows, six a step beside two that are replayed.
TRAINING = STEPS | {"epochs": 3}


@pytest.fixture(scope="module")
def two_replaying(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int | str, JobValues]:
    """Full tuning with replay on two workers: given rows at every ZeRO stage, and rows that the base writes."""
    folder = tmp_path_factory.mktemp("replaying")
    jobs: dict[int | str, JobValues] = {
        stage: replay_job(folder / str(stage), tiny_model, folder, workers=2, zero=stage) for stage in range(4)
    }
    written = [{"type": "replay", "generate": {"examples": 6, "max_new_tokens": 8}}]
    job = start_job(folder / "written", tiny_model, workers=2, zero=1, training=TRAINING, protections=written)
    data = ready_data(spec_of(job), Workspace.at(folder / "written" / "workspace"), Console(quiet=True))
    jobs["written"] = job | {"prepared": str(data)}
    train_in_group(list(jobs.values()), 2, folder / "ray")
    return jobs


def replay_job(folder: Path, model: Path, facts: Path, **scale: int) -> JobValues:
    protections = replay_of(facts)
    return start_job(folder, model, tuning={"type": "full"}, training=TRAINING, protections=protections, **scale)


def in_plain_torch(job: JobValues) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights with rows mixed here by the rule, one example at a time, without the schedule."""
    import random

    spec, data = spec_of(job), load_prepared(Path(job["prepared"]))
    settings = spec.training
    seed_everything(settings.seed)
    model = apply_tuning(load_base(Path(spec.model), torch.float32), spec.tuning)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    queue: list[int] = []
    for number in range(9):
        order = list(range(len(data.replay)))
        random.Random(f"{settings.seed}/replay/{number}").shuffle(order)
        queue += order
    rates = [row["learning_rate"] for row in rows_of(run_of(job)) if row["kind"] == "step"]
    curve = []
    for step in range(20):
        epoch, place = divmod(step, 8)
        order = list(range(len(data.train)))
        random.Random(f"{settings.seed}/{epoch}").shuffle(order)
        batch = [data.train[index] for index in order[place * 6 : place * 6 + 6]]
        batch += [data.replay[index] for index in queue[step * 2 : step * 2 + 2]]
        total = torch.zeros(())
        for example in batch:
            ids, wanted = torch.tensor([example.ids]), torch.tensor(example.is_target)[1:]
            total = total + functional.cross_entropy(
                model(ids).logits[0, :-1][wanted], ids[0, 1:][wanted], reduction="sum"
            )
        loss = total / sum(sum(example.is_target) for example in batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or 0.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        curve.append(loss.item())
    return curve, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(two_replaying: dict[int | str, JobValues]) -> tuple[list[float], dict[str, torch.Tensor]]:
    return in_plain_torch(two_replaying[0])


def expect(job: JobValues, plain: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    curve, final = plain
    assert losses(job) == pytest.approx(curve, abs=1e-4)
    given = weights(job)
    assert max((given[name] - final[name]).abs().max().item() for name in given) < 1e-5


@pytest.mark.parametrize("stage", range(4))
def test_two_workers_replay_as_plain_torch_does(
    two_replaying: dict[int | str, JobValues], plain: tuple[list[float], dict[str, torch.Tensor]], stage: int
) -> None:
    expect(two_replaying[stage], plain)


@pytest.mark.parametrize("stage", range(4))
def test_one_worker_replays_as_plain_torch_does(
    one_process: None,
    tiny_model: Path,
    plain: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
    stage: int,
) -> None:
    job = replay_job(tmp_path / "run", tiny_model, tmp_path, zero=stage)
    train_here(job).engine.destroy()
    expect(job, plain)


def test_the_realised_shares_are_logged_and_told(two_replaying: dict[int | str, JobValues]) -> None:
    job = two_replaying[0]
    rows = rows_of(run_of(job))
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["num_replay"] for row in steps] == [2] * 20
    assert [row["num_rows"] for row in steps] == ([8] * 7 + [5]) * 2 + [8] * 4, "the eighth of an epoch holds three"
    (total,) = [row for row in rows if row["kind"] == "replay"]
    for name in ("num_rows", "num_replay", "num_target_tokens", "num_replay_target_tokens"):
        assert total[name] == sum(row[name] for row in steps)
    told = dict(cost_rows(read_metrics(run_of(job).metrics), 0.0))
    assert told["replayed rows"] == "40 of 154 (26.0%)"
    realised = total["num_replay_target_tokens"] / total["num_target_tokens"]
    assert told["replayed target tokens"].endswith(f"({realised:.1%})")
    assert realised == pytest.approx(plan_of(job).replay_token_share or 0.0, abs=0.1)


def test_rows_that_the_base_writes_in_a_task_are_replayed(two_replaying: dict[int | str, JobValues]) -> None:
    job = two_replaying["written"]
    steps = [row for row in rows_of(run_of(job)) if row["kind"] == "step"]
    assert [row["num_replay"] for row in steps] == [2] * 20
    assert all(row["num_replay_target_tokens"] > 0 for row in steps)
    cache = run_of(job).path.parents[1] / "cache" / "replay"
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".jsonl", ".log"]
    (rows,) = cache.glob("*.jsonl")
    assert len(rows.read_text().splitlines()) == 6


def test_a_resumed_run_replays_what_an_uninterrupted_one_does(
    one_process: None, tiny_model: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"tuning": {"type": "full"}, "protections": replay_of(tmp_path)}
    training = TRAINING | {"max_steps": 8, "checkpoint_every_steps": 3}
    whole, cut = (start_job(tmp_path / name, tiny_model, training=training, **keys) for name in ("whole", "cut"))
    train_here(whole)
    train_here(cut | {"plan": cut["plan"] | {"steps": 3, "checkpoint_every_steps": 3}})
    artifact = run_of(cut).artifact
    artifact.rename(artifact.with_name("early"))
    trainer = train_here(cut)
    assert losses(cut)[3:] == losses(whole)[3:]
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())
    assert [row for row in rows_of(run_of(cut)) if row["kind"] == "replay"][-1]["num_replay"] == 16
    assert trainer.schedule.num_replay == 11


def test_a_plan_to_replay_without_rows_is_refused(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    job = start_job(tmp_path, tiny_model, protections=replay_of(tmp_path))
    prepared = Path(job["prepared"])
    with RowWriter(prepared / "replay.arrow") as writer:
        writer.write_rows([])
    write_meta(prepared, {name: read_json(prepared / META)[name] for name in TOLD})
    with pytest.raises(TenureError, match="there are no rows to replay"):
        train_here(job)


def test_lengths_and_counts_of_training_leave_replay_out() -> None:
    row = Encoded((1, 2, 3), (False, True, True))
    counts = Prepared((row, row), {}, 0, replay=(Encoded((1,) * 9, (False,) * 5 + (True,) * 4),)).counts()
    assert (counts.num_examples, counts.num_tokens, counts.num_target_tokens, counts.longest) == (2, 6, 4, 9)
    assert (counts.num_replay, counts.num_replay_target_tokens) == (1, 4)
