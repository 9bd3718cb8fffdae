"""What a base model scores on the suites of the preset `knowledge`, and whether each is above chance.

    python -m benchmarks.preset_base --workspace WORKSPACE --out benchmarks/results/preset-base.json

The packaged SmolLM2-135M-Instruct unless --model names a folder; the product's own scoring in this process. Intervals
are 95 % bootstrap intervals over items; chance is told as before a training run (docs/measures.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.items import Answered
from training.evaluation.power import powers
from training.evaluation.presets import add_presets, knowledge
from training.evaluation.scoring import ScoreJob, read_scores, score_model
from training.evaluation.stats import bootstrap_interval
from training.fetch import fetch_model
from training.models import hash_folder
from training.spec import RunSpec
from training.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True, help="where the packaged model and data lie, or go")
    parser.add_argument("--model", type=Path, help="a model's folder, in place of the packaged one")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    workspace = Workspace.at(arguments.workspace)
    model = arguments.model or fetch_model(workspace)
    spec = preset_spec(model, workspace)
    answers, seconds = score(spec)
    suites = figures(spec, answers)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    written = {"machine": machine, "model_hash": hash_folder(model), "seconds": round(seconds), "suites": suites}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print_table(suites)


def preset_spec(model: Path, workspace: Workspace) -> RunSpec:
    """A spec with the preset's suites. A spec needs training data and a target, which nothing is made of here."""
    item = next(suite for suite in knowledge(workspace) if suite.name == "knowledge-count")
    target = item.model_copy(update={"name": "target", "limit": 1}).model_dump(mode="json", exclude_none=True)
    given = {
        "name": "preset-base",
        "model": str(model),
        "tuning": {"type": "full"},
        "data": {"train": [{"path": str(item.path), "prompt": "prompt", "completion": "completion"}]},
        "suites": {"target": [target], "presets": ["knowledge"]},
        "training": {"learning_rate": 1e-4},
    }
    return add_presets(RunSpec.model_validate(given, context={"folder": Path.cwd()}), workspace)


def score(spec: RunSpec) -> tuple[dict[str, list[Answered]], float]:
    """The base's answers by suite, and the seconds that they took."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "scores.json"
        job = ScoreJob(spec.model_dump(mode="json"), spec.model, None, False, str(target), str(Path(scratch) / "log"))
        seconds = score_model(job)
        return read_scores(target)[0], seconds


def figures(spec: RunSpec, answers: dict[str, list[Answered]]) -> list[dict[str, Any]]:
    """Every retention suite's score with its interval, its chance and what the power check says of it."""
    found = []
    for power in powers(spec, answers):
        if power.role == "retention":
            scores = np.array([answer.score for answer in answers[power.name]])
            weights = np.array([answer.weight for answer in answers[power.name]])
            found.append(vars(power) | {"interval": bootstrap_interval(scores, weights)})
    return found


def print_table(suites: list[dict[str, Any]]) -> None:
    print("| suite | items | score | 95 % interval | chance | above chance | items to see a loss of 0.02 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for suite in suites:
        low, high = suite["interval"]
        above = "no" if not suite["above_chance"] else "yes" if suite["chance"] else "–"
        cells = [f"`{suite['name']}`", suite["num_items"], f"{suite['base']:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{suite['chance']:.3f}" if suite["chance"] else "–", above, f"{suite['items_to_see']:,}"]
        print(f"| {' | '.join(str(cell) for cell in cells)} |")


if __name__ == "__main__":
    main()
