"""Whole runs by the command line: status, scorecard, report, tracking, registry, and nothing left behind."""

from __future__ import annotations

import json
import re

import psutil
from commands import Command
from conftest import WholeRun
from mlflow.tracking import MlflowClient

from training.evaluation.scorecard import Scorecard, read_scorecard
from training.mlflow_store import client
from training.tracking import tracking_id_of


def store(whole: WholeRun) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{whole.workspace.root / 'mlflow.db'}")


def test_a_kept_contract_is_status_0_and_a_broken_one_3(kept_run: WholeRun, broken_run: WholeRun) -> None:
    assert kept_run.status == 0, kept_run.command.err
    assert broken_run.status == 3, broken_run.command.err
    assert "Contract kept: run tiny-1" in kept_run.command.out
    assert "Contract broken: run broken-1" in broken_run.command.out


def test_the_screen_shows_steps_and_no_chatter(kept_run: WholeRun) -> None:
    assert kept_run.command.err == ""
    assert "step 60/60" in kept_run.command.out
    assert "Warning" not in kept_run.command.out


def test_the_scorecard_and_the_report_are_there(kept_run: WholeRun, broken_run: WholeRun) -> None:
    for whole, verdict in ((kept_run, "kept"), (broken_run, "broken")):
        card = read_scorecard(whole.run.scorecard)
        assert (card.run, card.contract.verdict) == (whole.run.id, verdict)
        assert {suite.name: len(suite.items) for suite in card.suites} == {"sums": 8, "sentences": 8}
        assert card.probes["base"] != card.probes["tuned"]
        page = whole.run.report.read_text(encoding="utf-8")
        assert whole.run.id in page
        assert "metrics.jsonl left out" not in page


def test_scores_of_the_same_weights_are_the_same(kept_run: WholeRun, broken_run: WholeRun) -> None:
    cards = [read_scorecard(whole.run.scorecard) for whole in (kept_run, broken_run)]
    assert [(suite.base, suite.tuned) for suite in cards[0].suites] == [(s.base, s.tuned) for s in cards[1].suites]


def test_a_second_run_scores_only_the_tuned_model(kept_run: WholeRun, broken_run: WholeRun) -> None:
    assert (kept_run.run.logs / "score-base.log").is_file()
    assert (broken_run.run.logs / "score-tuned.log").is_file()
    assert not (broken_run.run.logs / "score-base.log").exists()
    cached = sorted((kept_run.workspace.cache / "scores").iterdir(), key=lambda file: file.stat().st_mtime)
    assert max(file.stat().st_mtime for file in cached[:2]) < kept_run.run.scorecard.stat().st_mtime


def test_tracking_holds_parameters_metrics_and_lineage(kept_run: WholeRun) -> None:
    tracked = store(kept_run).get_run(tracking_id_of(kept_run.run))
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["tuning.type"] == "lora"
    assert tracked.data.params["training.learning_rate"] == "0.001"
    assert tracked.data.params["plan.workers"] == "2"
    assert tracked.data.tags["contract"] == "kept"
    assert re.fullmatch("[0-9a-f]{64}", tracked.data.tags["lineage.base_model.sha256"])
    assert "lineage.packages.deepspeed" in tracked.data.tags
    for name in ("loss", "learning_rate", "grad_norm", "num_tokens", "seconds"):
        history = store(kept_run).get_metric_history(tracked.info.run_id, name)
        assert sorted(point.step for point in history) == list(range(1, 61)), name
    validated = store(kept_run).get_metric_history(tracked.info.run_id, "validation/sentences")
    assert sorted(point.step for point in validated) == [0, 20, 40, 60]
    assert tracked.data.metrics["target/sums/change"] == 0.0


def test_a_restarted_run_is_tracked_once_a_step(broken_run: WholeRun) -> None:
    history = store(broken_run).get_metric_history(tracking_id_of(broken_run.run), "loss")
    assert sorted(point.step for point in history) == list(range(1, 61))


def test_the_registered_version_names_run_and_verdict(kept_run: WholeRun, broken_run: WholeRun) -> None:
    for whole, name, verdict in ((kept_run, "tiny", "kept"), (broken_run, "broken", "broken")):
        tags = [
            version.tags
            for version in store(whole).search_model_versions(f"name='{name}'")
            if version.run_id == tracking_id_of(whole.run)
        ]
        assert [(found["run"], found["contract"]) for found in tags] == [(whole.run.id, verdict)]
        assert tags[0]["artifact_hash"] == read_scorecard(whole.run.scorecard).artifact_hash


def test_nothing_is_left_running(kept_run: WholeRun, broken_run: WholeRun) -> None:
    """No process that descends from a command is alive, so none of its ports is open either."""
    for whole in (kept_run, broken_run):
        _, alive = psutil.wait_procs(whole.command.survivors(), timeout=30)  # a process that ends takes a moment
        assert [process.cmdline() for process in alive] == []


def test_runs_report_and_compare_print(kept_run: WholeRun, broken_run: WholeRun) -> None:
    def printed(*arguments: str) -> str:
        command = Command.start(*arguments, workspace=kept_run.workspace.root)
        assert command.finish() == 0, command.err
        return command.out

    listed = printed("runs")
    assert "tiny-1" in listed
    assert "broken-1" in listed
    assert "Contract kept" in printed("report", "tiny-1")
    card = Scorecard.model_validate(json.loads(printed("report", "tiny-1", "--json")))
    assert card == read_scorecard(kept_run.run.scorecard)
    compared = printed("compare", "tiny-1", "broken-1")
    assert "tiny-1" in compared
    assert "broken-1" in compared


def test_resuming_a_finished_run_does_nothing_again(kept_run: WholeRun) -> None:
    before = kept_run.run.registration.read_bytes()
    command = Command.start("resume", "tiny-1", workspace=kept_run.workspace.root)
    assert command.finish() == 0, command.err
    assert "tiny-1 is finished" in command.out
    versions = client(kept_run.workspace).search_model_versions("name = 'tiny'")
    assert [str(version.version) for version in versions if version.tags["run"] == "tiny-1"] == ["1"]
    assert kept_run.run.registration.read_bytes() == before
