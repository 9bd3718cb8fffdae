"""A sweep and its trials in MLflow, and `tenure report SWEEP`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweep_results import made_up_sweep

from cluster.cli import cli
from sweeps.importance import Importance
from sweeps.result import SweepResult, write_result
from sweeps.tracking import log_sweep, log_trial
from training.errors import TenureError
from training.mlflow_store import client
from training.workspace import Workspace


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return made_up_sweep()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(result: SweepResult) -> list[Importance]:
        return []

    monkeypatch.setattr("sweeps.report.importances", told)


def test_a_sweep_and_its_trials_are_parent_and_children(
    result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path)
    store = client(workspace)
    experiment = store.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = store.create_run(experiment).info.run_id
    trials = {trial.state: trial for trial in result.trials}
    children = {}
    for state, trial in trials.items():
        child = store.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
        log_trial(workspace, child, trial, [p for p in result.points if p.trial == trial.name])
        children[state] = store.get_run(child)
    page = tmp_path / "report.html"
    page.write_text("page")
    log_sweep(workspace, parent, result, [page, tmp_path / "missing"])

    found = store.get_run(parent)
    assert found.info.status == "FINISHED"
    assert found.data.tags["winner.strategy"] == "lora-kl"
    assert result.winner is not None
    assert result.winner.test is not None
    assert found.data.metrics["winner/test/gain"] == pytest.approx(result.winner.test.gain.value)
    assert found.data.metrics["trials_failed"] == 2
    front = json.loads((tmp_path / "artifacts" / parent / "artifacts" / "front.json").read_text())["front"]
    assert found.data.metrics["front_points"] == len(front)
    assert (tmp_path / "artifacts" / parent / "artifacts" / "report.html").is_file()

    assert {state: run.info.status for state, run in children.items()} == {
        "finished": "FINISHED",
        "stopped": "KILLED",
        "failed": "FAILED",
    }
    finished, failed = children["finished"], children["failed"]
    assert finished.data.tags["mlflow.parentRunId"] == parent
    assert finished.data.tags["setting.training.learning_rate"]
    assert failed.data.tags["cause"] == trials["failed"].cause
    rungs = store.get_metric_history(finished.info.run_id, "rung/gain")
    assert [metric.step for metric in rungs] == [seen.rung for seen in trials["finished"].curve]


def report(workspace: Path, *arguments: str) -> None:
    cli.main(["--workspace", str(workspace), "report", *arguments], standalone_mode=False)


def test_report_shows_a_sweep_and_writes_its_page(
    result: SweepResult, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweeps" / "made-up-1"
    write_result(folder / "result.json", result)
    report(tmp_path, "made-up-1", "--price", "2")
    shown = capfd.readouterr().out
    assert "Winner: lora-kl" in shown
    assert "price, at 2 a GPU hour" in shown
    assert "Winner: lora-kl" in (folder / "report.html").read_text()
    assert (folder / "winner.yaml").is_file()
    report(tmp_path, "made-up-1", "--json")
    assert SweepResult.model_validate_json(capfd.readouterr().out) == result


def test_a_sweep_without_a_result_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    with pytest.raises(TenureError, match="tenure sweep --resume mine"):
        report(tmp_path, "mine")
