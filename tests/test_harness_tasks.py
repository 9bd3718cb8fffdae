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
from training.evaluation.harness_tasks import hash_task, load_tasks
from training.evaluation.judge import score_suite
from training.evaluation.scoring import ScoreJob, alone, read_scores, score_model
from training.spec import Contract
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


def write_group(folder: Path, averaged: bool = True, **second: Any) -> Path:
    """A group of tasks of twelve and five items, averaged by tasks in acc_norm and by items in acc, or not at all."""
    for name, size, changes in (("many", 12, {}), ("few", 5, second)):
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        write_task(folder, name, dataset_kwargs=data, **changes)
        rows = (folder / "colours.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:size]))
    group: dict[str, Any] = {"group": "both", "task": ["many", "few"]}
    if averaged:
        ways = (("acc_norm", False), ("acc", True))
        group["aggregate_metric_list"] = [{"metric": name, "weight_by_size": by_size} for name, by_size in ways]
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump(group), encoding="utf-8")
    return path


def score(folder: Path, model: Path, suites: list[dict[str, Any]]) -> dict[str, list[Answered]]:
    """The answers of a model to harness suites, as a run would score them."""
    target = {"name": "sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "question"}
    target |= {"completion": "answer", "max_new_tokens": 2, "limit": 1}
    spec = load_spec(write_tiny_spec(folder, model, suites={"target": [target], "retention": suites}))
    job = ScoreJob(spec.model_dump(mode="json"), str(model), None, False, str(folder / "s.json"), str(folder / "log"))
    score_model(job)
    return read_scores(folder / "s.json")[0]


def command_line(folder: Path, model: Path, tasks: str) -> dict[str, Any]:
    """What the harness's own command line makes of tasks and groups: their results, and the samples of `colours`."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", tasks, "--batch_size", "16"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(folder / "out"), "--include_path", str(folder)]
    with alone():
        environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_colours_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())
    return found | {"samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def test_scores_are_those_of_the_harnesss_own_command_line(tiny_model: Path, tmp_path: Path) -> None:
    task, group = write_task(tmp_path), write_group(tmp_path)
    suites = [{"name": "acc", "harness": str(task)}, {"name": "norm", "harness": str(task), "score": "acc_norm"}]
    groups = [{"name": "by-task", "harness": str(group)}, {"name": "by-item", "harness": str(group), "score": "acc"}]
    answers = score(tmp_path, tiny_model, [*suites, *groups])
    theirs = command_line(tmp_path, tiny_model, "colours,both")
    for suite, metric in (("acc", "acc"), ("norm", "acc_norm")):
        mine = [answer.score for answer in answers[suite]]
        assert mine == [sample[metric] for sample in sorted(theirs["samples"], key=lambda s: s["doc_id"])]
        assert sum(mine) / len(mine) == pytest.approx(theirs["results"]["colours"][f"{metric},none"], abs=1e-12)
    first = answers["acc"][0]
    assert (first.prompt, first.expected, first.chance) == ("colour 0 of the rainbow is", "red", 1 / 3)
    assert {answer.answer for answer in answers["acc"]} <= set(COLOURS)
    for suite, metric in (("by-task", "acc_norm"), ("by-item", "acc")):
        _check_group(suite, answers[suite], theirs["groups"]["both"][f"{metric},none"])


def _check_group(name: str, answers: list[Answered], wanted: float) -> None:
    """The group's figure is the harness's, and its parts are its tasks."""
    card = score_suite(Harness(name=name, harness="both"), "retention", answers, answers, Contract())
    assert card.base == card.tuned == pytest.approx(wanted, abs=1e-12)
    assert card.chance == pytest.approx(1 / 3)
    assert [(part.name, part.num_items, part.lost) for part in card.parts] == [("many", 12, 0), ("few", 5, 0)]
    many, few = (part.base for part in card.parts)
    assert many != few
    assert wanted == pytest.approx((many + few) / 2 if name == "by-task" else (12 * many + 5 * few) / 17)


def test_a_limit_counts_the_items_of_every_task(tmp_path: Path) -> None:
    group = Harness(name="both", harness=str(write_group(tmp_path)))
    first = hash_task(group)
    assert hash_task(group.model_copy(update={"limit": 12})) == first
    assert hash_task(group.model_copy(update={"limit": 2})) != first
    assert hash_task(Harness(name="both", harness=str(write_group(tmp_path, averaged=False)))) != first


def test_tasks_of_a_group_are_scored_by_a_metric_that_all_have(tmp_path: Path) -> None:
    path = write_group(tmp_path, averaged=False, metric_list=[{"metric": "acc_norm"}])
    loaded = load_tasks(Harness(name="both", harness=str(path)))
    assert (list(loaded.tasks), loaded.metric, loaded.by_size) == (["many", "few"], "acc_norm", True)
    assert "the task 'few' has no metric 'acc'\n    -> set score: acc_norm" in refused(harness=str(path), score="acc")
    path = write_group(tmp_path, averaged=False, metric_list=[{"metric": "mcc"}])
    assert "its tasks share no such metric: list them as suites of their own" in refused(harness=str(path))


def test_the_harnesss_own_group_mmlu_is_one_suite_of_57_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {"question": "Which is red?", "choices": ["sea", "grass", "blood", "snow"], "answer": 2, "subject": "any"}
    part = datasets.Dataset.from_list([row] * 2)
    few = datasets.DatasetDict({"test": part, "dev": part})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: few)
    loaded = load_tasks(Harness(name="mmlu", harness="mmlu"))
    assert (len(loaded.tasks), loaded.metric, loaded.by_size) == (57, "acc", True)
    assert "mmlu_abstract_algebra" in loaded.tasks
    tag = load_tasks(Harness(name="stem", harness="mmlu_stem_tasks"))
    assert set(tag.tasks) < set(loaded.tasks)
    assert "did you mean" in refused(harness="mmluu")


def refused(**fields: Any) -> str:
    with pytest.raises(TenureError) as caught:
        load_tasks(Harness(name="h", **fields))
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
