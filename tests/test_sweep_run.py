"""A whole sweep through Ray Tune: strategies in warm actors, finalists, winner, resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_spec import sums, write_rows, write_tiny_spec

from cluster.sweep import promote_sweep, read_sweep, settle_on
from sweeps import driver
from sweeps.folder import SweepFolder, new_folder
from sweeps.result import SweepResult, read_result
from sweeps.spec import Split
from sweeps.splitting import split_suites
from training.data.items import read_items
from training.errors import TenureError
from training.workspace import Workspace

QUIET = Console(quiet=True)
RATE = {"low": 1e-4, "high": 1e-3, "log": True}
FULL = {"name": "full", "tuning": {"type": "full"}, "space": {"training.learning_rate": RATE}}


@pytest.fixture(scope="module")
def swept(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepFolder, Workspace, SweepResult]:
    """A sweep of two strategies and one that fails at its first step, to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    workspace = Workspace.at(folder / "workspace")
    write_tiny_spec(folder, tiny_model, training={"epochs": 2}, scaling={"zero_stage": 0})
    write_rows(folder / "sums.jsonl", sums(24))
    strategies = [
        FULL,
        {"name": "lora", "tuning": {"type": "lora", "rank": 4}, "set": {"training.learning_rate": 1e-3}},
        {"name": "wild", "tuning": {"type": "full"}, "set": {"training.learning_rate": 1e30}},
    ]
    sweep = {"name": "s", "base": "spec.yaml", "strategies": strategies, "budget": {"trials": 3}, "rungs": 2}
    sweep |= {"contract": {"max_loss": 100.0}, "finalists": 1, "seeds": [0, 1], "alphas": [0.5], "scheduler": "none"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    spec, notes = read_sweep(path, workspace)
    made = driver.begin(spec, path.read_text(encoding="utf-8"), notes, workspace)
    return made, workspace, driver.carry_on(made, workspace, QUIET)


Swept = tuple[SweepFolder, Workspace, SweepResult]


def test_every_trial_has_its_end(swept: Swept) -> None:
    states = {trial.strategy: trial.state for trial in swept[2].trials if "seed" not in trial.name}
    assert states == {"full": "finished", "lora": "finished", "wild": "failed"}
    wild = next(trial for trial in swept[2].trials if trial.strategy == "wild")
    assert "finite" in str(wild.cause)


def test_all_strategies_of_a_rung_saw_the_same_tokens(swept: Swept) -> None:
    curves = [trial.curve for trial in swept[2].trials if trial.state == "finished" and len(trial.curve) == 2]
    assert len(curves) == 2
    assert curves[0][0].tokens == curves[1][0].tokens < curves[0][1].tokens == curves[1][1].tokens


def test_finished_trials_add_their_curve_and_are_runs(swept: Swept) -> None:
    folder, workspace, result = swept
    assert {(point.strategy, point.alpha) for point in result.points if "seed" not in point.trial} == {
        ("full", None), ("full", 0.5), ("lora", None), ("lora", 0.5)
    }  # fmt: skip
    run = workspace.run(f"{folder.id}-trial-001")
    assert run.artifact.is_dir()
    assert run.scorecard.is_file()
    parent = folder.read_shared().mlflow_run
    from training.mlflow_store import client
    from training.tracking import tracking_id_of

    assert client(workspace).get_run(tracking_id_of(run)).data.tags["mlflow.parentRunId"] == parent


def test_the_winner_ran_under_every_seed_and_is_scored_on_test(swept: Swept) -> None:
    folder, _, result = swept
    assert result.finished is not None
    assert result.winner is not None
    assert result.winner.seeds == (0, 1)
    assert result.winner.test is not None
    assert result.winner.test.split == "test"
    assert folder.winner.is_file()
    assert folder.report.is_file()


def test_a_resumed_sweep_does_nothing_twice(swept: Swept) -> None:
    folder, workspace, result = swept
    before = {file.name: file.stat().st_mtime_ns for file in folder.trials.iterdir()}
    again = driver.carry_on(driver.resume(folder.id, workspace), workspace, QUIET)
    assert {file.name: file.stat().st_mtime_ns for file in folder.trials.iterdir()} == before
    assert {trial.name for trial in again.trials} == {trial.name for trial in result.trials}
    assert read_result(folder.result) == again


def test_a_resumed_search_measures_trials_against_those_before(swept: Swept) -> None:
    folder, _, _ = swept
    sweep = folder.read_spec().model_copy(update={"scheduler": "asha", "reduction": 2})
    best = max(seen.score or 0.0 for record in folder.records() for seen in record.trial.curve if seen.rung == 0)
    halving, fresh = driver._scheduler(sweep, folder), SimpleNamespace(trial_id="fresh")
    halving.on_trial_add(None, fresh)
    assert halving.on_trial_result(None, fresh, {"resource": 1, "score": best - 1000.0}) == "STOP"
    alone = driver._scheduler(sweep, SweepFolder(folder.path / "empty"))
    alone.on_trial_add(None, fresh)
    assert alone.on_trial_result(None, fresh, {"resource": 1, "score": best - 1000.0}) == "CONTINUE"


def test_other_seeds_of_a_setting_are_no_trials_of_the_search(swept: Swept) -> None:
    _, _, result = swept
    again = [trial for trial in result.trials if trial.rerun_of]
    assert [(trial.rerun_of, trial.seed) for trial in again] == [(result.finalists[0].trial, 1)] + [
        ("trial-000", 1) for _ in result.finalists[1:]
    ]
    assert result.spent.trials == len(result.searched) == 3
    assert not {point.trial for point in result.points} & {trial.name for trial in again}


def test_a_trial_of_two_workers_is_trained_by_ray_train(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    write_tiny_spec(tmp_path, tiny_model, training={"epochs": 1}, scaling={"workers": 2, "zero_stage": 1})
    write_rows(tmp_path / "sums.jsonl", sums(24))
    rates = {"training.learning_rate": [1e-3]}
    sweep = {"name": "s", "base": "spec.yaml", "space": rates, "budget": {"trials": 1}, "finalists": 0}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, "alphas": [0.5], "contract": {"max_loss": 100.0}}), encoding="utf-8")
    spec, notes = read_sweep(path, workspace)
    folder = driver.begin(spec, path.read_text(encoding="utf-8"), notes, workspace)
    result = driver.carry_on(folder, workspace, QUIET)
    assert [(trial.state, trial.cause) for trial in result.trials] == [("finished", None)]
    assert {point.alpha for point in result.points} == {None, 0.5}
    plan = json.loads(workspace.run(f"{folder.id}-trial-000").plan.read_text(encoding="utf-8"))
    assert (plan["workers"], plan["zero_stage"]) == (2, 1)


def test_a_population_trains_its_generations_and_its_best_runs_again(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    write_tiny_spec(tmp_path, tiny_model, training={"epochs": 1}, scaling={"zero_stage": 0})
    write_rows(tmp_path / "sums.jsonl", sums(24))
    sweep = {"name": "s", "base": "spec.yaml", "search": "pbt", "rungs": 2, "budget": {"trials": 2}, "seeds": [0]}
    sweep |= {"space": {"training.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}}, "finalists": 1}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, "alphas": [], "contract": {"max_loss": 100.0}}), encoding="utf-8")
    spec, notes = read_sweep(path, workspace)
    folder = driver.begin(spec, path.read_text(encoding="utf-8"), notes, workspace)
    result = driver.carry_on(folder, workspace, QUIET)
    members = [(trial.name, trial.state, [one.rung for one in trial.curve]) for trial in result.searched]
    assert members == [("trial-000", "finished", [0, 1]), ("trial-001", "finished", [0, 1])]
    population = json.loads(folder.population.read_text(encoding="utf-8"))
    parents = {member["parent"] for member in population["members"]}
    assert (population["generation"], len(parents)) == (1, 1)
    assert result.winner is not None
    assert result.finalists[0].trials == (f"{result.winner.trial}-seed-0",)
    assert result.winner.run == f"s-{result.winner.trial}-seed-0"


def begin_another(swept: Swept, **keys: Any) -> SweepFolder:
    """Another sweep over the same data: what is shared stands already."""
    folder, workspace, _ = swept
    path = Path(workspace.root).parent / f"{keys['name']}.yaml"
    given = yaml.safe_load(folder.spec_yaml.read_text(encoding="utf-8")) | {"strategies": [FULL], "finalists": 0}
    path.write_text(yaml.safe_dump(given | {"alphas": [], "budget": {"trials": 2}} | keys), encoding="utf-8")
    spec, notes = read_sweep(path, workspace)
    return driver.begin(spec, path.read_text(encoding="utf-8"), notes, workspace)


@pytest.mark.parametrize("search", ["tpe", "multi-objective"])
def test_optuna_chooses_settings_and_its_journal_outlives_the_driver(swept: Swept, search: str) -> None:
    folder = begin_another(swept, name=search, search=search, rungs=1)
    result = driver.carry_on(folder, swept[1], QUIET)
    assert [trial.state for trial in result.trials] == ["finished", "finished"]
    rates = {trial.config["training.learning_rate"] for trial in result.trials}
    assert len(rates) == 2
    assert folder.study.is_file()


def test_trials_that_wait_for_what_never_comes_end_the_sweep(swept: Swept) -> None:
    import ray

    folder = begin_another(swept, name="waits", rungs=1, wait_s=3.0)

    @ray.remote(num_cpus=4)
    class Everything:
        def hold(self) -> None:
            pass

    holder = Everything.remote()
    ray.get(holder.hold.remote())
    try:
        with pytest.raises(TenureError, match=r"no trial could start .* each waits for 1 CPU \(0 free\)"):
            driver.carry_on(folder, swept[1], QUIET)
    finally:
        ray.kill(holder)


def test_promoting_a_sweep_registers_its_winner(swept: Swept) -> None:
    from serving.registry import registered_artifact
    from training.evaluation.scorecard import read_scorecard

    folder, workspace, result = swept
    assert result.winner is not None
    assert result.winner.run is not None
    promote_sweep(folder.id, workspace)
    run = workspace.run(result.winner.run)
    assert json.loads(run.registration.read_text(encoding="utf-8"))["name"] == folder.id
    assert registered_artifact(run, read_scorecard(run.scorecard)) == run.artifact


def test_a_name_is_taken_once(swept: Swept) -> None:
    with pytest.raises(TenureError, match="there is a sweep 's' already"):
        new_folder(swept[1], swept[0].id)


def test_what_lies_between_becomes_the_artifact(swept: Swept) -> None:
    folder, workspace, _ = swept
    run = workspace.run(f"{folder.id}-trial-001")
    settle_on(run, 0.5)
    from serving.registry import registered_artifact
    from training.evaluation.scorecard import read_scorecard

    assert registered_artifact(run, read_scorecard(run.scorecard)) == run.artifact
    assert json.loads(run.spec.read_text())["protections"] == [{"type": "wise", "alpha": 0.5}]


def test_halves_share_no_item_and_lose_none(swept: Swept, tmp_path: Path) -> None:
    folder, workspace, _ = swept
    suites = folder.read_spec().run.suites
    validation, test, _ = split_suites(suites, Split(), workspace)
    for whole, one, other in zip(suites.all, validation.all, test.all, strict=True):
        prompts = [[(i.prompt, i.completion) for i in read_items(half)] for half in (whole, one, other)]
        assert sorted(prompts[1] + prompts[2]) == sorted(prompts[0])
        assert not set(prompts[1]) & set(prompts[2])
