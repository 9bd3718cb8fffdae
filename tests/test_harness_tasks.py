"""Tasks of lm-evaluation-harness as suites: the figures of its own command line, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_spec import write_rows, write_tiny_spec

from training.data.items import Answered
from training.errors import TenureError
from training.evaluation.harness_tasks import hash_task, load_task
from training.evaluation.scoring import ScoreJob, alone, read_scores, score_model
from training.specfile import load_spec
from training.suite_spec import Harness

COLOURS = ("red", "green", "blue sky")


def write_task(folder: Path, name: str = "colours", **changes: Any) -> Path:
    """A task's file, with its data beside it."""
    rows = [{"q": f"colour {n} of the rainbow is", "options": list(COLOURS), "right": n % 3} for n in range(12)]
    data = write_rows(folder / "colours.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def score(folder: Path, model: Path, suites: list[dict[str, Any]]) -> dict[str, list[Answered]]:
    """The answers of a model to harness suites, as a run would score them."""
    target = {"name": "sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "question"}
    target |= {"completion": "answer", "max_new_tokens": 2, "limit": 1}
    spec = load_spec(write_tiny_spec(folder, model, suites={"target": [target], "retention": suites}))
    job = ScoreJob(spec.model_dump(mode="json"), str(model), None, False, str(folder / "s.json"), str(folder / "log"))
    score_model(job)
    return read_scores(folder / "s.json")[0]


def command_line(folder: Path, model: Path, task: Path) -> dict[str, Any]:
    """What the harness's own command line makes of a task: its results and samples."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", str(task), "--batch_size", "16"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(folder / "out")]
    with alone():
        environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["colours"]
    return found | {"samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def test_scores_are_those_of_the_harnesss_own_command_line(tiny_model: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path)
    suites = [{"name": "acc", "harness": str(task)}, {"name": "norm", "harness": str(task), "score": "acc_norm"}]
    answers = score(tmp_path, tiny_model, suites)
    theirs = command_line(tmp_path, tiny_model, task)
    for suite, metric in (("acc", "acc"), ("norm", "acc_norm")):
        mine = [answer.score for answer in answers[suite]]
        assert mine == [sample[metric] for sample in sorted(theirs["samples"], key=lambda s: s["doc_id"])]
        assert sum(mine) / len(mine) == pytest.approx(theirs[f"{metric},none"], abs=1e-12)
    first = answers["acc"][0]
    assert (first.prompt, first.expected, first.chance) == ("colour 0 of the rainbow is", "red", 1 / 3)
    assert {answer.answer for answer in answers["acc"]} <= set(COLOURS)


def refused(**fields: Any) -> str:
    with pytest.raises(TenureError) as caught:
        load_task(Harness(name="h", **fields))
    return str(caught.value)


def test_a_file_that_is_no_task_is_refused(tmp_path: Path) -> None:
    gone = write_task(tmp_path, "gone", dataset_kwargs={"data_files": {"test": str(tmp_path / "no.jsonl")}})
    told = refused(harness=str(gone))
    assert "cannot be loaded" in told
    assert "its data must lie on this machine" in told


def test_a_metric_that_the_task_lacks_is_refused_with_one_that_it_has(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    assert "has no metric 'f2'\n    -> set score: acc" in refused(harness=str(task), score="f2")


def test_a_metric_that_is_no_mean_over_items_is_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path, metric_list=[{"metric": "mcc"}])
    assert "is no mean over items" in refused(harness=str(task))


def test_a_tasks_hash_follows_its_data_and_settings(tmp_path: Path) -> None:
    first = Harness(name="h", harness=str(write_task(tmp_path)))
    hashed = hash_task(first)
    assert hash_task(first) == hashed
    assert hash_task(first.model_copy(update={"limit": 3})) != hashed
    write_task(tmp_path, doc_to_text="{{q}}:")
    assert hash_task(first) != hashed


def test_a_spec_names_a_task_without_a_metric(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    spec = load_spec(write_tiny_spec(tmp_path, Path("m"), suites={"target": [{"name": "h", "harness": path.name}]}))
    (suite,) = spec.suites.every
    assert isinstance(suite, Harness)
    assert (suite.metric, suite.harness) == ("harness", str(path))
    assert spec.suites.all == ()
