"""From the command to the first step: where the seconds go, with a tiny model and warm caches, on a processor.

    python -m benchmarks.startup --inputs inputs --out benchmarks/results/startup.json

`inputs` are those of benchmarks/train.py. A first run fills the caches (tokens, the base's scores); the others are
timed by what appears on the disk: the run's folder (the spec is read, data and plan are made, Ray stands), the worker's
log (Ray Train started the worker and its process group), `kernels:` in it (data, tokenizer and base are loaded), and
the first step in metrics.jsonl (engine, first look, step). `alone` are what bare processes take to load the same
libraries, and to start Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.train import make_folder, random_model

MARKS = ("run folder", "worker", "model loaded", "first step", "end")
ALONE = {
    "import torch": "import torch",
    "import transformers' auto model": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "import deepspeed": "from training.engine import _import_deepspeed; _import_deepspeed()",
    "import ray train": "import ray.train.torch",
    "import tenure's command line": "import cluster.cli",
    "import tenure's worker": "import training.worker",
    "ray.init and shutdown": "import ray; ray.init(address='local', num_cpus=2, log_to_driver=False); ray.shutdown()",
}


def write_job(inputs: Path, folder: Path) -> Path:
    """A tiny model's run of two steps; the path of its spec."""
    model = folder / "model"
    make_folder("tiny", inputs, model)
    random_model(model, gpu=False).save_pretrained(model)
    lines = (inputs / "rows.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:64]) + "\n")
    (folder / "suite.jsonl").write_text("\n".join(lines[64:80]) + "\n")
    suite = {"name": "held", "path": str(folder / "suite.jsonl"), "metric": "cross_entropy"}
    rows = {"prompt": "prompt", "completion": "completion"}
    spec = {
        "name": "startup",
        "model": str(model),
        "tuning": {"type": "full"},
        "data": {"train": [{"path": str(folder / "train.jsonl"), **rows}]},
        "suites": {"target": [suite | rows]},
        "training": {"learning_rate": 1e-5, "global_batch_size": 8, "max_steps": 2, "precision": "fp32"}
        | {"validation_items": 0, "validate_every_steps": 0, "checkpoint_every_steps": 0, "max_length": 512},
    }
    file = folder / "spec.yaml"
    file.write_text(json.dumps(spec))
    return file


def run_once(spec: Path, workspace: Path) -> dict[str, float]:
    """Seconds from the command to every mark."""
    known = set(workspace.glob("runs/startup-*"))
    started = time.perf_counter()
    command = [sys.executable, "-m", "cluster", "--workspace", str(workspace), "train", str(spec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[str, float] = {}
    pending = dict(marks(workspace, known))
    while process.poll() is None:
        for name in [name for name, is_there in pending.items() if is_there()]:
            found[name] = time.perf_counter() - started
            del pending[name]
        time.sleep(0.005)
    if "first step" not in found:
        raise SystemExit(f"the run failed: {process.stdout.read() if process.stdout else ''}")
    return found | {"end": time.perf_counter() - started}


def marks(workspace: Path, known: set[Path]) -> Iterator[tuple[str, Callable[[], bool]]]:
    """What tells that a run got there."""

    def holds(file: str, text: str) -> bool:
        runs = set(workspace.glob("runs/startup-*")) - known
        return any((run / file).is_file() and text in (run / file).read_text(errors="ignore") for run in runs)

    yield "run folder", lambda: bool(set(workspace.glob("runs/startup-*")) - known)
    yield "worker", lambda: holds("logs/worker-0.log", "")
    yield "model loaded", lambda: holds("logs/worker-0.log", "kernels:")
    yield "first step", lambda: holds("metrics.jsonl", '"kind": "step"')


def alone(turns: int) -> dict[str, float]:
    """Median seconds of bare processes, less those of Python itself."""
    empty = statistics.median(seconds_of("pass") for _ in range(turns))
    return {name: statistics.median(seconds_of(code) for _ in range(turns)) - empty for name, code in ALONE.items()}


def seconds_of(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


def figures(turns: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(turn[name] for turn in turns) for name in MARKS}
    before = {name: medians[earlier] for earlier, name in itertools.pairwise(MARKS)}
    return {"at": medians, "took": {name: medians[name] - before.get(name, 0.0) for name in MARKS}, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where it works; default: beside the result")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = (arguments.folder or arguments.out.parent / ".startup").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    spec = write_job(arguments.inputs, folder)
    run_once(spec, folder / "workspace")
    turns = [run_once(spec, folder / "workspace") for _ in range(arguments.turns)]
    about = {"python": platform.python_version(), "processors": os.cpu_count(), "load": os.getloadavg()[0]}
    told = {"machine": about, **figures(turns), "alone": alone(arguments.turns)}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({key: told[key] for key in ("at", "took", "alone")}, indent=1))


if __name__ == "__main__":
    main()
