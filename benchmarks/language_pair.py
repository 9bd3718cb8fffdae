"""A model that knows one task is taught another: what plain tuning forgets, and what each protection keeps.

    python -m benchmarks.language_pair --out benchmarks/results/language-pair.json
    python -m benchmarks.language_pair --pair mixed --out benchmarks/results/language-pair-mixed.json

A byte-level Llama of two layers (82 thousand parameters) is first taught sums of digits from random weights, as
"what is 3+4", and then differences, as "what is 7-4": full tuning, the same steps and learning rate for every
protection, each run by the spec, loop and protections that any run has, on the machine's processors. Three seeds of the
order of the examples and of what is drawn. Scores are nats per target token and the share of tokens that are the
likeliest, on all rows of both tasks, of the exported artifact. The first task is never trained on again, other than by
replay, which is given it or has the base write its own rows.

In the pair `mixed` a sixth of the new rows are sums, which the base finds easy, as new data often repeats some of what
a model knows; the other sums are what is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch.nn import functional

from cluster.pipeline import read_spec
from cluster.session import ray_session
from training.aids import ready_aids, ready_data
from training.data.encoding import Encoded
from training.data.prepare import load_prepared
from training.job import Job, make_job
from training.stages import hash_training, plan_run
from training.tuning import load_base
from training.worker import Trainer
from training.workspace import RunFolder, Workspace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import make_tiny_model

SUMS = [{"question": f"what is {a}+{b}", "answer": str(a + b)} for a in range(10) for b in range(10)]
DIFFERENCES = [{"question": f"what is {a}-{b}", "answer": str(a - b)} for a in range(10) for b in range(10)]
# The rows of the new task, and those of the old one that are scored.
PAIRS = {
    "differences": (DIFFERENCES, SUMS),
    "mixed": (DIFFERENCES + SUMS[::5], [row for index, row in enumerate(SUMS) if index % 5]),
}
OLD = [{"path": "all-sums.jsonl", "prompt": "question", "completion": "answer"}]
PROTECTIONS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "l2sp": [{"type": "l2sp", "strength": 100.0}],
    "ewc exact": [{"type": "ewc", "strength": 1000.0, "data": OLD, "examples": 100}],
    "ewc empirical": [{"type": "ewc", "strength": 1000.0, "data": OLD, "examples": 100, "estimator": "empirical"}],
    "si": [{"type": "si", "strength": 50.0}],
    "replay, given": [{"type": "replay", "share": 0.25, "data": OLD}],
    "replay, written by the base": [{"type": "replay", "share": 0.25, "generate": {"examples": 100}}],
    "kl": [{"type": "kl", "strength": 1.0, "top_k": 64}],
    "wise": [{"type": "wise", "alpha": 0.5}],
    "flow": [{"type": "flow"}],
    "stm": [{"type": "stm", "threshold": 10.0}],
    "ewc exact and replay": [
        {"type": "ewc", "strength": 1000.0, "data": OLD, "examples": 100},
        {"type": "replay", "share": 0.25, "data": OLD},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protections", nargs="+", choices=PROTECTIONS, default=list(PROTECTIONS))
    parser.add_argument("--pair", choices=PAIRS, default="differences")
    parser.add_argument("--first-steps", type=int, default=600)
    parser.add_argument("--second-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny_model(folder / "random")
        new, kept = PAIRS[arguments.pair]
        for name, rows in (("all-sums", SUMS), ("sums", kept), ("new", new), ("differences", DIFFERENCES)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        with ray_session(None, {"CPU": 1.0}, folder / "ray.log"), alone(folder):
            for seed in arguments.seeds:
                results += one_seed(folder, seed, arguments)
    table = summarise(results, arguments.protections)
    about = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    settings = {"pair": arguments.pair, "first_steps": arguments.first_steps, "second_steps": arguments.second_steps}
    written = {"machine": about, "settings": settings, "summary": table, "runs": results}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A process group of this process."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def one_seed(folder: Path, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every protection's scores on both tasks, and the base's, for one seed."""
    workspace = Workspace.at(folder / f"workspace-{seed}")
    recorded = [{"type": "si", "strength": 1.0, "record": True}]
    base = train(folder, workspace, "all-sums", folder / "random", recorded, seed, arguments.first_steps, 3e-3)
    found = [{"protection": "base", "seed": seed, **score(base, workspace, folder)}]
    for name in arguments.protections:
        protections = [dict(protection) for protection in PROTECTIONS[name]]
        for protection in protections:
            if protection["type"] == "si":
                protection["importance"] = str(base / "importance")
        artifact = train(folder, workspace, "new", base, protections, seed, arguments.second_steps, 1e-3)
        found.append({"protection": name, "seed": seed, **score(artifact, workspace, folder)})
        print(found[-1], flush=True)
    return found


def train(
    folder: Path,
    workspace: Workspace,
    task: str,
    model: Path,
    protections: list[dict[str, Any]],
    seed: int,
    steps: int,
    rate: float,
) -> Path:
    """The artifact of a run of the product's own loop in this process."""
    path = write_spec(folder, task, model, protections, seed, steps, rate)
    spec = read_spec(path, workspace)
    plan, _ = plan_run(spec, workspace)
    run = RunFolder(workspace.new_run(spec.name).path)
    run.logs.mkdir(exist_ok=True)
    prepared = ready_data(spec, workspace, Console(quiet=True))
    aids = ready_aids(spec, prepared, workspace, run.logs, None)
    trainer = Trainer.start(Job(**make_job(spec, plan, prepared, run, hash_training(spec), aids)), run)
    trainer.run()
    trainer.engine.destroy()
    return run.artifact


def write_spec(
    folder: Path, task: str, model: Path, protections: list[dict[str, Any]], seed: int, steps: int, rate: float
) -> Path:
    columns = {"prompt": "question", "completion": "answer"}
    suites = [{"name": name, "path": f"{name}.jsonl", "metric": "cross_entropy", **columns} for name in TASKS]
    spec = {
        "name": task,
        "model": str(model),
        "tuning": {"type": "full"},
        "protections": protections,
        "data": {"train": [{"path": f"{task}.jsonl", **columns}]},
        "suites": {"target": suites[1:], "retention": suites[:1]},
        "training": {
            "learning_rate": rate,
            "epochs": steps,
            "max_steps": steps,
            "global_batch_size": 32,
            "micro_batch_size": 32,
            "max_length": 64,
            "precision": "fp32",
            "seed": seed,
            "validation_items": 0,
            "validate_every_steps": 0,
            "checkpoint_every_steps": 0,
        },
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


TASKS = ("sums", "differences")


def score(artifact: Path, workspace: Workspace, folder: Path) -> dict[str, Any]:
    """Nats and accuracy per target token of both tasks' rows, by the artifact as it was exported."""
    model = load_base(artifact, torch.float32).eval()
    scores: dict[str, Any] = {}
    for task in TASKS:
        path = write_spec(folder, task, folder / "random", [], 0, 1, 1e-3)
        _, prepared = plan_run(read_spec(path, workspace), workspace)
        rows = load_prepared(prepared).train
        nats, right = zip(*(score_row(model, row) for row in rows), strict=True)
        targets = sum(row.num_targets for row in rows)
        scores[task] = {"nats": sum(nats) / targets, "accuracy": sum(right) / targets}
    return scores


@torch.inference_mode()
def score_row(model: Any, row: Encoded) -> tuple[float, int]:
    """Nats summed over a row's target tokens, and how many of them are the likeliest."""
    ids, wanted = torch.tensor([row.ids]), torch.tensor(row.is_target)[1:]
    logits, labels = model(ids).logits[0, :-1][wanted], ids[0, 1:][wanted]
    nats = functional.cross_entropy(logits, labels, reduction="sum").item()
    return nats, int((logits.argmax(-1) == labels).sum())


def summarise(results: list[dict[str, Any]], protections: list[str]) -> list[dict[str, Any]]:
    """Means over the seeds, printed as a table."""
    table = []
    print("| protection | new task, nats | new, accuracy | old task, nats | old, accuracy | forgotten, nats |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = mean(results, "base", "sums", "nats")
    for name in ["base", *protections]:
        row = {"protection": name, "forgotten_nats": mean(results, name, "sums", "nats") - base}
        for task in TASKS:
            row |= {f"{task}_{key}": mean(results, name, task, key) for key in ("nats", "accuracy")}
        table.append(row)
        new, old = row["differences_nats"], row["sums_nats"]
        shares = f"{row['differences_accuracy']:.1%}", f"{row['sums_accuracy']:.1%}"
        print(f"| {name} | {new:.3f} | {shares[0]} | {old:.3f} | {shares[1]} | {row['forgotten_nats']:.3f} |")
    return table


def mean(results: list[dict[str, Any]], name: str, task: str, key: str) -> float:
    return float(statistics.mean(found[task][key] for found in results if found["protection"] == name))


if __name__ == "__main__":
    main()
