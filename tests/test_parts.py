"""One model's suites in several processes: the scores of one process, from parts that are worth one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_spec import write_rows, write_tiny_spec

from training.evaluation.parts import cost_of, join_parts, split_job
from training.evaluation.scoring import ScoreJob, base_log_probs, score_model
from training.evaluation.spread import score_jobs
from training.processes import cpus_each
from training.spec import RunSpec, Scaling
from training.specfile import load_spec
from training.suite_spec import Harness
from training.workspace import read_json

CLOZE = {"prompt": "question", "choices": ["1", "2", "3"], "answer": "answer"}
WRITTEN = {"prompt": "question", "completion": "answer", "max_new_tokens": 4}


def spec_of(folder: Path, model: Path) -> RunSpec:
    """Two suites over one file that are written, and two over files of their own that are read."""
    for name, count in (("sums", 8), ("choices", 6), ("text", 5)):
        rows = [
            {"question": f"what is {n}", "answer": str(n % 3 + 1), "text": f"{n} is a number"} for n in range(count)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    target = [{"name": "exact", "path": "sums.jsonl", "metric": "exact_match", **WRITTEN}]
    retention = [
        {"name": "likeness", "path": "sums.jsonl", "metric": "chrf", **WRITTEN},
        {"name": "choices", "path": "choices.jsonl", "metric": "accuracy", **CLOZE},
        {"name": "text", "path": "text.jsonl", "metric": "cross_entropy", "text": "text"},
    ]
    return load_spec(write_tiny_spec(folder, model, suites={"target": target, "retention": retention}))


def job_of(spec: RunSpec, folder: Path) -> ScoreJob:
    target = folder / "scores.json"
    log = str(folder / "score-base.log")
    return ScoreJob(spec.model_dump(mode="json"), spec.model, None, False, str(target), log, str(target))


def test_parts_hold_every_suite_once_and_those_of_one_file_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, Path("some/model"))
    job = job_of(spec, tmp_path)
    assert [cost_of(suite) for suite in spec.suites.every] == [32, 32, 6 * 16, 20]
    assert split_job(job, spec, 8) == [job]  # too little for a process of its own
    monkeypatch.setattr("training.evaluation.parts.WORTH_A_PROCESS", 90)
    assert split_job(job, spec, 1) == [job]
    parts = split_job(job, spec, 8)
    assert [part.suites for part in parts] == [("choices",), ("exact", "likeness", "text")]
    assert [part.is_first for part in parts] == [True, False]
    assert len({part.target for part in parts} | {part.log for part in parts} | {job.target}) == 5
    assert parts == split_job(job, spec, 8)


def test_a_task_of_the_harness_is_taken_for_a_thousand_items() -> None:
    assert cost_of(Harness(name="h", harness="hellaswag")) == 10 * cost_of(Harness(name="h", harness="h", limit=100))


def test_parts_give_the_scores_of_one_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through score_jobs, where there is room for two processes; a part that is there already is not scored again."""
    spec = spec_of(tmp_path, tiny_model)
    whole, split = (job_of(spec, tmp_path / name) for name in ("whole", "split"))
    for job in (whole, split):
        Path(job.target).parent.mkdir()
    score_model(whole)
    monkeypatch.setattr("training.evaluation.parts.WORTH_A_PROCESS", 90)
    scored: list[tuple[str, ...] | None] = []

    def here(compute: Callable[[Any], Any], jobs: list[ScoreJob], *_: Any) -> list[Any]:
        scored.extend(job.suites for job in jobs)
        return [compute(job) for job in jobs]

    monkeypatch.setattr("training.evaluation.spread.run_tasks", here)
    monkeypatch.setattr("training.evaluation.spread.num_places", lambda *_: 2)
    first, second = split_job(split, spec, 2)
    score_model(second)
    score_jobs([split], spec, tmp_path)
    assert scored == [first.suites]
    alone, joined = (read_json(Path(job.target)) for job in (whole, split))
    assert list(joined["suites"]) == [suite.name for suite in spec.suites.every]
    assert {**joined, "seconds": 0} == {**alone, "seconds": 0}
    assert base_log_probs(Path(split.target)).read_bytes() == base_log_probs(Path(whole.target)).read_bytes()
    assert not list(Path(split.target).parent.glob(".*part*"))
    assert join_parts(whole, spec, [whole]) == alone["seconds"]


def test_processes_on_one_machine_share_its_processors() -> None:
    cpus = Scaling()
    assert [cpus_each(jobs, cpus, [8]) for jobs in (1, 2, 3, 20)] == [8, 4, 2, 1]
    assert [cpus_each(jobs, cpus, [16, 8]) for jobs in (1, 2, 3)] == [8, 8, 4]
    assert cpus_each(3, Scaling(gpus_per_worker=1), [64]) == 1
