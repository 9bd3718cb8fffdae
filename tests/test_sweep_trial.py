"""Trials of a sweep one by one, in this process: faults that are caused, early stops, budgets, population steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from rich.console import Console
from tiny_spec import sums, write_rows, write_tiny_spec

from cluster.sweep import read_sweep
from sweeps import driver
from sweeps.actor import TrialActor
from sweeps.bench import Bench
from sweeps.folder import SweepFolder
from sweeps.preparing import check_reachable, share
from sweeps.spec import Budget
from sweeps.trial import TrialJob, forget_generations, ready_here, trial_spec
from sweeps.watch import Budgeted, spent
from training.data.prepare import prepare
from training.errors import TenureError
from training.evaluation.metrics import NATS
from training.protection.passes import importance_of_run
from training.section import Source
from training.stages import protocol_key
from training.strategy import Ewc
from training.worker import Trainer
from training.workspace import Workspace

RATE = {"low": 1e-4, "high": 1e-3, "log": True}


@pytest.fixture(scope="module")
def begun(
    one_process: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepFolder, Workspace]:
    """A sweep of full tuning that is settled, its base scored; no trial was tried."""
    folder = tmp_path_factory.mktemp("trials")
    workspace = Workspace.at(folder / "workspace")
    write_tiny_spec(folder, tiny_model, training={"epochs": 1}, scaling={"zero_stage": 0})
    write_rows(folder / "sums.jsonl", sums(24))
    full = {"name": "full", "tuning": {"type": "full"}, "space": {"training.learning_rate": RATE}}
    sweep = {"name": "s", "base": "spec.yaml", "strategies": [full], "rungs": 2, "alphas": []}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, "contract": {"max_loss": 100.0}}), encoding="utf-8")
    spec, notes = read_sweep(path, workspace)
    made = driver.begin(spec, path.read_text(encoding="utf-8"), notes, workspace)
    with (
        mock.patch("training.evaluation.spread.run_tasks", lambda compute, jobs, *_: [compute(job) for job in jobs]),
        mock.patch("training.evaluation.spread.num_places", return_value=1),
    ):
        share(spec, made, workspace, driver.known_settings(spec), Console(quiet=True))
    return made, workspace


Begun = tuple[SweepFolder, Workspace]


def test_a_sweep_that_was_killed_before_it_was_settled_is_settled_when_it_is_resumed(begun: Begun) -> None:
    folder, workspace = begun
    settled = folder.read_shared()
    folder.shared.unlink()
    again = driver.resume(folder.id, workspace).read_shared()
    own = {"mlflow_run", "started"}
    assert again.model_dump(exclude=own) == settled.model_dump(exclude=own)


def actor(begun: Begun, name: str, rate: float = 1e-3, **given: Any) -> TrialActor:
    folder, workspace = begun
    job = TrialJob(name, "full", {"training.learning_rate": rate}, 0, **given)
    config = {"workspace": str(workspace.root), "folder": str(folder.path), "job": {**asdict(job), "whole": False}}
    return TrialActor(config)


def failing_once(at: int, error: Exception) -> Any:
    """Trainer.train_step with one failure, at a step."""
    real, failures = Trainer.train_step, [error]

    def step(trainer: Trainer) -> None:
        if failures and trainer.step == at:
            raise failures.pop()
        real(trainer)

    return mock.patch.object(Trainer, "train_step", step)


def changed(begun: Begun, **keys: Any) -> Any:
    """The sweep's spec with other keys, for as long as the context lasts."""
    spec = begun[0].read_spec().model_copy(update=keys)
    return mock.patch.object(SweepFolder, "read_spec", return_value=spec)


def test_a_trial_that_ran_out_of_memory_is_tried_again_with_half_the_micro_batch(begun: Begun) -> None:
    trial = actor(begun, "memory")
    with failing_once(1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        first, second = trial.step(), trial.step()
    assert (first["done"], second["done"]) == (False, True)
    record = begun[0].read("memory")
    assert record is not None
    assert (record.trial.state, record.trial.attempts) == ("finished", 2)
    plan = json.loads(begun[1].run(f"{begun[0].id}-memory").plan.read_text(encoding="utf-8"))
    assert (plan["micro_batch_size"], plan["accumulation_steps"]) == (4, 2)


def test_a_trial_that_fails_otherwise_is_not_tried_again(begun: Begun) -> None:
    trial = actor(begun, "torn")
    with failing_once(1, RuntimeError("the disk fell out")):
        told = trial.step()
    record = begun[0].read("torn")
    assert record is not None
    assert told["done"]
    assert (record.trial.state, record.trial.attempts) == ("failed", 1)
    assert record.trial.cause == "failed: RuntimeError: the disk fell out"


def test_a_trial_that_cannot_keep_the_contract_any_more_is_stopped_at_its_rung(begun: Begun) -> None:
    folder, _ = begun
    strict = folder.read_spec().run.contract.model_copy(update={"max_loss": 1e-6})
    with changed(begun, contract=strict, stop_at_loss=1.0):
        told = actor(begun, "hopeless", rate=3e-2).step()
    record = folder.read("hopeless")
    assert record is not None
    assert told["done"]
    assert (record.trial.state, record.trial.rung) == ("stopped", 0)
    assert "cannot keep the contract: sentences lost" in str(record.trial.cause)


def test_a_trial_whose_record_stands_is_not_done_again(begun: Begun) -> None:
    first = actor(begun, "again")
    told = [first.step(), first.step()][-1]
    with failing_once(0, AssertionError("it was trained again")):
        again = actor(begun, "again").step()
    assert (again["done"], again["score"]) == (True, told["score"])


def test_a_losing_member_goes_on_from_the_winners_weights(begun: Begun) -> None:
    folder, workspace = begun
    pbt = {"search": "pbt", "budget": Budget(trials=2)}
    with changed(begun, **pbt):
        for name, rate in (("best", 1e-3), ("worst", 1e-4)):
            told = actor(begun, name, rate, generation=0).step()
            assert (told["done"], folder.read(name)) == (True, None)
        at = json.loads(workspace.run(f"{folder.id}-best").plan.read_text(encoding="utf-8"))["steps"]
        seen: list[int] = []
        with watched_steps(seen):
            told = actor(begun, "worst", 2e-3, generation=1, parent="best").step()
        assert seen[0] == -(-at // 2)
    record = folder.read("worst")
    assert record is not None
    assert (told["done"], record.trial.state, record.trial.config) == (
        True,
        "finished",
        {"training.learning_rate": 2e-3},
    )
    assert [one.rung for one in record.trial.curve] == [0, 1]
    assert record.trial.tokens > record.trial.curve[0].tokens > 0
    spec = json.loads(workspace.run(f"{folder.id}-worst").spec.read_text(encoding="utf-8"))
    assert spec["training"]["learning_rate"] == 2e-3


def test_a_member_that_ran_out_of_memory_keeps_its_smaller_micro_batch(begun: Begun) -> None:
    folder = begun[0]
    with changed(begun, search="pbt", budget=Budget(trials=2)):
        with failing_once(0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
            actor(begun, "small", generation=0).step()
        assert micro_and_accumulation(begun, "small") == (4, 2)
        with failing_once(0, AssertionError("it began anew")):
            told = actor(begun, "small", generation=1, parent="small").step()
        assert micro_and_accumulation(begun, "small") == (4, 2)
    record = folder.read("small")
    assert record is not None
    assert (told["done"], record.trial.state) == (True, "finished")


def micro_and_accumulation(begun: Begun, name: str) -> tuple[int, int]:
    folder, workspace = begun
    plan = json.loads(workspace.run(f"{folder.id}-{name}").plan.read_text(encoding="utf-8"))
    return plan["micro_batch_size"], plan["accumulation_steps"]


def test_what_is_noted_of_a_generation_has_weights_and_is_not_trained_again(begun: Begun) -> None:
    folder, workspace = begun
    with changed(begun, search="pbt", budget=Budget(trials=2)):
        with mock.patch.object(Trainer, "save_to", side_effect=OSError("the disk is full")):
            assert actor(begun, "torn-off", generation=0).step()["score"] == -1e9
        assert 0 not in folder.noted_curve("torn-off")
        told = actor(begun, "twice", generation=0).step()
        with failing_once(0, AssertionError("it was trained again")):
            again = actor(begun, "twice", generation=0).step()
        assert {key: again[key] for key in ("score", "tokens", "done")} == {
            key: told[key] for key in ("score", "tokens", "done")
        }
        forget_generations(workspace.run(f"{folder.id}-twice"))
        actor(begun, "twice", generation=1, parent="twice").step()
    record = folder.read("twice")
    assert record is not None
    assert "there are no whole weights of 'twice' from generation 0" in str(record.trial.cause)


def test_the_budget_counts_members_that_wait_for_their_next_generation(begun: Begun) -> None:
    folder, _ = begun
    with changed(begun, search="pbt", budget=Budget(trials=2)):
        before = sum(trial.tokens for trial in folder.under_way())
        told = actor(begun, "waiting", generation=0).step()
    spent_so_far = sum(record.trial.tokens for record in folder.records()) + before + told["tokens"]
    for bound, ends in ((spent_so_far, True), (spent_so_far + 1, False)):
        sweep = folder.read_spec().model_copy(update={"budget": Budget(tokens=bound)})
        assert Budgeted(sweep, folder).stop_all() is ends


def test_a_member_of_a_population_that_breaks_the_contract_stays(begun: Begun) -> None:
    folder, _ = begun
    strict = folder.read_spec().run.contract.model_copy(update={"max_loss": 1e-6})
    with changed(begun, contract=strict, stop_at_loss=1.0, search="pbt", budget=Budget(trials=2)):
        told = actor(begun, "breaker", rate=3e-2, generation=0).step()
    assert told["score"] < -900
    assert folder.read("breaker") is None


def test_another_seed_of_a_finalist_is_scored_where_that_stands(begun: Begun) -> None:
    """The sweep's other alphas are for the front, where other seeds have no place."""
    with changed(begun, alphas=(0.25, 0.5)):
        trial = actor(begun, "other-seed", rerun_of="first", alphas=[0.5])
        trial.step(), trial.step()
    record = begun[0].read("other-seed")
    assert record is not None
    assert [point.alpha for point in record.points] == [None, 0.5]


@contextmanager
def watched_steps(seen: list[int]) -> Iterator[None]:
    real = Trainer.train_step

    def step(trainer: Trainer) -> None:
        seen.append(trainer.step)
        real(trainer)

    with mock.patch.object(Trainer, "train_step", step):
        yield


@pytest.mark.parametrize(("bound", "used"), [({"tokens": 100}, (100, 0.0)), ({"gpu_hours": 0.5}, (0, 0.5))])
def test_a_budget_ends_the_search_with_the_trials_under_way(
    begun: Begun, bound: dict[str, Any], used: tuple[int, float], tmp_path: Path
) -> None:
    spec = begun[0].read_spec()
    sweep = spec.model_copy(update={"budget": spec.budget.model_copy(update=bound)})
    empty = SweepFolder(tmp_path)
    stopper = Budgeted(sweep, empty)
    assert not stopper.stop_all()
    stopper("id", {"trial": "one", "tokens": used[0] - 1, "gpu_hours": used[1] - 0.1})
    assert not stopper.stop_all()
    stopper("id", {"trial": "one", "tokens": used[0], "gpu_hours": used[1]})
    assert stopper.stop_all()
    assert spent(sweep, empty) is None


def test_every_seed_uses_the_importance_computed_before_the_trials(begun: Begun) -> None:
    """A finalist is tried under seeds that nothing was computed for."""
    folder, workspace = begun
    bench = Bench.open(str(workspace.root), str(folder.path))
    job = TrialJob("seed", "full", {"training.learning_rate": 1e-3}, 0)
    spec = trial_spec(bench, job)
    ewc = Ewc(strength=1.0, data=(Source.model_validate({"path": spec.data.train[0].path}),))
    spec = spec.model_copy(update={"protections": (ewc,)})
    prepared = prepare(spec, workspace)
    with pytest.raises(TenureError, match="not one of those computed before the trials"):
        ready_here(spec, prepared, bench, folder.logs)
    computed = importance_of_run(ewc, spec, workspace)
    assert computed is not None
    computed.mkdir(parents=True)
    seeded = spec.model_copy(update={"training": spec.training.model_copy(update={"seed": 7})})
    assert importance_of_run(ewc, seeded, workspace) != computed
    assert ready_here(seeded, prepared, bench, folder.logs) == {"ewc": str(computed)}


def test_retention_that_nothing_can_show_is_refused_before_the_trials(begun: Begun) -> None:
    """The tiny base is right on no item: shares alone would show nothing; a cross-entropy does."""
    folder, workspace = begun
    spec = trial_spec(Bench.open(str(workspace.root), str(folder.path)), TrialJob("power", "full", {}, 0))
    check_reachable(spec, workspace)
    assert all(suite.metric not in NATS for suite in spec.suites.target)
    hopeless = spec.model_copy(update={"suites": spec.suites.model_copy(update={"retention": spec.suites.target})})
    with (
        mock.patch("sweeps.preparing.stages.protocol_key", return_value=protocol_key(spec)),
        pytest.raises(TenureError, match="no retention suite has a base above chance"),
    ):
        check_reachable(hopeless, workspace)
