"""What workers tell of their steps: a log by rank, and gauges that Prometheus reads from Ray's agent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from jobs import STEPS, rows_of, run_of, start_job, train_here

from training import telemetry
from training.events import log_event
from training.job import Job
from training.telemetry import GAUGES, Telemetry
from training.worker import Trainer
from training.workspace import RunFolder

DASHBOARD = Path(__file__).resolve().parents[1] / "examples/operating/grafana.json"


class Gauge:
    """Keeps what is set, by name, labels and all."""

    kept: ClassVar[dict[str, tuple[float, dict[str, str]]]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self.name, self.keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.keys
        self.tags = tags

    def set(self, value: float) -> None:
        self.kept[self.name] = (value, self.tags)


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, dict[str, str]]]:
    """The gauges of a process that is one of Ray's."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    Gauge.kept = {}
    return Gauge.kept


def test_a_run_tells_what_its_metrics_say(
    one_process: None, tiny_model: Path, tmp_path: Path, gauges: dict[str, Any]
) -> None:
    job = start_job(tmp_path, tiny_model, zero=1, training=STEPS | {"max_steps": 4, "epochs": 1})
    for _ in range(3):
        log_event(run_of(job), "attempt")
    train_here(job)
    last = [row for row in rows_of(run_of(job)) if row["kind"] == "step"][-1]
    values = {name.removeprefix("tenure_train_"): value for name, (value, _) in gauges.items()}
    assert values == {
        "step": 4,
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
        "learning_rate": last["learning_rate"],
        "tokens_per_second": last["num_tokens"] / last["seconds"],
        "step_seconds": last["seconds"],
        "data_seconds": values["data_seconds"],
        "checkpoint_seconds": values["checkpoint_seconds"],
        "restarts": 2,
    }
    assert 0 < values["data_seconds"] < last["seconds"]
    assert gauges["tenure_train_loss"][1] == {"run": "tiny-1", "rank": "0"}
    logged = [json.loads(line) for line in (run_of(job).logs / "worker-0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert logged[-1]["step_seconds"] == last["seconds"]


def test_steps_are_told_outside_of_a_worker(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    """As a benchmark makes them, which calls train_step() where there is no folder of logs yet."""
    job = start_job(tmp_path, tiny_model, zero=1, training=STEPS | {"max_steps": 4, "epochs": 1})
    Trainer.start(Job(**job), run_of(job)).train_step()
    assert len((run_of(job).logs / "worker-0.jsonl").read_text().splitlines()) == 1


def test_the_share_of_the_peak_follows_from_tokens(tmp_path: Path, gauges: dict[str, Any]) -> None:
    """500 tokens a second of 8 GFLOP each are 4 of 10 TFLOP/s."""
    row = {"step": 1, "loss": 1.0, "grad_norm": None, "learning_rate": 0.1, "num_tokens": 1000, "seconds": 2.0}
    Telemetry("run", 0, tmp_path / "log", token_flops=8e9, peak_flops=10e12).tell_step(row, 0.1)
    assert gauges["tenure_train_mfu"][0] == pytest.approx(0.4)
    assert "tenure_train_grad_norm" not in gauges, "a norm that is not finite is not told"


def test_other_ranks_tell_of_themselves_alone(tmp_path: Path, gauges: dict[str, Any]) -> None:
    row = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "num_tokens": 1000, "seconds": 2.0}
    Telemetry("run", 3, tmp_path / "log").tell_step(row, 0.1)
    assert sorted(gauges) == ["tenure_train_data_seconds", "tenure_train_step", "tenure_train_step_seconds"]


def test_outside_of_ray_there_are_no_gauges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    told = Telemetry("run", 0, tmp_path / "log")
    told.set({"loss": 1.0})
    assert told._gauges == {}


def test_the_dashboard_shows_every_gauge_and_no_other() -> None:
    shown = set(re.findall(r"ray_tenure_train_(\w+)", DASHBOARD.read_text(encoding="utf-8")))
    assert shown == set(GAUGES)
    assert json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert telemetry.GAUGES is GAUGES


def test_events_are_read_though_the_last_is_torn(tmp_path: Path) -> None:
    from training.events import read_events

    run = RunFolder(tmp_path)
    assert read_events(run) == []
    log_event(run, "attempt", workers=2)
    with run.events.open("a", encoding="utf-8") as stream:
        stream.write('{"time_s": 1, "ev')
    assert [(event["event"], event["workers"]) for event in read_events(run)] == [("attempt", 2)]
