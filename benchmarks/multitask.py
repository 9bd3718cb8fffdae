"""Five real tasks learned in one run by a mixture, and the same rows learned one task after the other.

    python -m benchmarks.multitask --workspace WORKSPACE --out benchmarks/results/multitask.json

SmolLM2-135M-Instruct, its last layers tuned, on this machine's processor: one run over a mixture by weight, and five
runs in a row, each from the artifact of the one before. Both see the same numbers of rows of every task with the same
learning rate and batch. Scores are nats per target token, and the share of rows whose every target token is the
likeliest (what greedy decoding would answer exactly), by the exported artifacts on rows that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional

from benchmarks.language_pair import alone
from benchmarks.multitask_data import TASKS, write_tasks
from cluster.pipeline import read_spec
from training.data.encoding import Encoded
from training.data.prepare import load_prepared
from training.fetch import fetch_data, fetch_model
from training.job import Job, make_job
from training.reporting.curves import read_metrics, task_totals
from training.stages import hash_training, plan_run
from training.tuning import load_base
from training.worker import Trainer
from training.workspace import RunFolder, Workspace, read_json

COLUMNS = {"prompt": "prompt", "completion": "answer", "chat": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True, help="where the packaged model and data lie, or go")
    parser.add_argument("--weights", type=float, nargs=5, default=[2.0, 1.0, 1.0, 1.0, 1.0])
    parser.add_argument("--rows", type=int, default=128, help="training rows a task there are")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6, help="how many of the 30 layers move, the last ones")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = Workspace.at(arguments.workspace)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), fetch_model(given), arguments)
        write_tasks(fetch_data(given), bench.folder, arguments.rows, arguments.test_rows)
        with alone(bench.folder):
            results = bench.run()
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "workspace")}
    written = {"machine": about, "settings": settings, **results}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print_tables(results)


class Bench:
    """The runs of one comparison in a folder of their own."""

    def __init__(self, folder: Path, base: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.base, self.arguments = folder, base, arguments
        self.workspace = Workspace.at(folder / "workspace")

    def run(self) -> dict[str, Any]:
        """Scores of the base, of the mixture, and after every task of the sequence on those learned so far."""
        results: dict[str, Any] = {"base": self.score(self.base, list(TASKS))}
        run = self.train("mixture", self.base, self.mixed(), {"by": "weight"})
        results["mixture"] = self.score(run.artifact, list(TASKS))
        plan = read_json(run.plan)
        metrics = read_metrics(run.metrics)
        assert metrics is not None
        results["asked"] = {task["name"]: task["asked_share"] for task in plan["tasks"]}
        results["realised"] = {
            task.name: {"rows": task.num_rows, "row_share": task.row_share, "target_share": task.target_token_share}
            for task in task_totals(metrics)
        }
        shutil.rmtree(run.path)
        rows = {task["name"]: task["num_rows_per_epoch"] for task in plan["tasks"]}
        results["when_learned"], results["sequence"] = self.sequence(rows)
        return results

    def sequence(self, rows: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every task's score right after its own run, and all of them after the last."""
        learned: dict[str, Any] = {}
        model, before = self.base, None
        for task in TASKS:
            run = self.train(task, model, [{**self.source(task), "cap": rows[task]}], {"by": "size"})
            learned |= self.score(run.artifact, [task])
            if before:
                shutil.rmtree(before.path)
            model, before = run.artifact, run
        return learned, self.score(model, list(TASKS))

    def mixed(self) -> list[dict[str, Any]]:
        parts = zip(TASKS, self.arguments.weights, strict=True)
        return [{**self.source(task), "weight": weight} for task, weight in parts]

    def source(self, task: str) -> dict[str, Any]:
        return {"name": task, "path": f"{task}.train.jsonl", **COLUMNS}

    def train(self, name: str, model: Path, sources: list[dict[str, Any]], mixture: dict[str, Any]) -> RunFolder:
        """A run of the product's own loop in this process."""
        started = time.monotonic()
        spec = read_spec(self.write_spec(name, model, sources, mixture), self.workspace)
        plan, prepared = plan_run(spec, self.workspace)
        run = RunFolder(self.workspace.new_run(spec.name).path)
        run.logs.mkdir(exist_ok=True)
        values = make_job(spec, plan, prepared, run, hash_training(spec), {})
        run.plan.write_text(json.dumps(values["plan"]), encoding="utf-8")
        trainer = Trainer.start(Job(**values), run)
        trainer.run()
        trainer.engine.destroy()
        print(f"{name}: {plan.steps} steps, {time.monotonic() - started:.0f} s", flush=True)
        return run

    def write_spec(self, name: str, model: Path, sources: list[dict[str, Any]], mixture: dict[str, Any]) -> Path:
        suite = {"name": name, "path": f"{next(iter(TASKS))}.test.jsonl", "metric": "cross_entropy", **COLUMNS}
        last = range(30 - self.arguments.layers, 30)
        spec = {
            "name": name,
            "model": str(model),
            "tuning": {"type": "partial", "parameters": [f"model.layers.{layer}.*" for layer in last]},
            "data": {"train": sources, "mixture": mixture},
            "suites": {"target": [suite]},
            "training": {
                "learning_rate": self.arguments.learning_rate,
                "epochs": self.arguments.epochs,
                "global_batch_size": 16,
                "micro_batch_size": 8,
                "max_length": 256,
                "precision": "fp32",
                "validation_items": 0,
                "validate_every_steps": 0,
                "checkpoint_every_steps": 0,
            },
        }
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        return path

    def score(self, artifact: Path, tasks: list[str]) -> dict[str, dict[str, float]]:
        """Every task's nats per target token and share of rows answered exactly."""
        model = load_base(artifact, torch.float32).eval()
        return {task: score_rows(model, self.test_rows(task)) for task in tasks}

    def test_rows(self, task: str) -> list[Encoded]:
        source = {"name": task, "path": f"{task}.test.jsonl", **COLUMNS}
        spec = read_spec(self.write_spec("score", self.base, [source], {"by": "size"}), self.workspace)
        _, prepared = plan_run(spec, self.workspace)
        return list(load_prepared(prepared).train)


@torch.inference_mode()
def score_rows(model: Any, rows: list[Encoded]) -> dict[str, float]:
    nats, targets, exact = 0.0, 0, 0
    for row in rows:
        ids, wanted = torch.tensor([row.ids]), torch.tensor(row.is_target)[1:]
        logits, labels = model(ids).logits[0, :-1][wanted], ids[0, 1:][wanted]
        nats += functional.cross_entropy(logits, labels, reduction="sum").item()
        targets += len(labels)
        exact += int((logits.argmax(-1) == labels).all())
    return {"nats": nats / targets, "exact": exact / len(rows)}


def print_tables(results: dict[str, Any]) -> None:
    print("| task | share asked | share seen | base | mixture | sequence, when learned | sequence, at the end |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for task in TASKS:
        cells = [f"{results['asked'][task]:.1%}", f"{results['realised'][task]['row_share']:.1%}"]
        for name in ("base", "mixture", "when_learned", "sequence"):
            cells.append(f"{results[name][task]['nats']:.3f} ({results[name][task]['exact']:.0%})")
        print(f"| {task} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
