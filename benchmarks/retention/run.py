"""A skill is taught, then a sweep teaches another: what full tuning at its best rate forgets, what its winner keeps.

    python -m benchmarks.retention.run --workspace WORKSPACE --out benchmarks/retention

Of each pair, SmolLM2-135M-Instruct is first taught the kept skill by `tenure train` (full tuning), and that model is
the base of two `tenure sweep`s on the new one: over the learning rate of plain full tuning, where forgetting stops
nothing, for the gain that there is to be had; and over eleven strategies under the contract: full tuning plain and with
seven protections, and three kinds of LoRA. Skills are made from real sentences (benchmarks/retention/tasks.py). Both
are scored by exact answers (`greedy_match`): retention is the share of the kept skill's right answers that is left.
OUT/figures.json holds the figures (those of other pairs stay), OUT/PAIR the specs, the sweep's result and its front.
`--skills` names a folder that write_skills() filled elsewhere; `--limit` interrupts what runs after so many minutes and
tells what there is; `--cpu`, `--rows`, `--trials` and `--model` make a rehearsal of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.retention.tasks import write_skills
from benchmarks.sweep_overhead import INTERRUPTED, limited, where
from sweeps.folder import SweepFolder
from sweeps.gather import gather
from sweeps.pareto import best_full
from sweeps.plots import draw_front
from sweeps.result import Finalist, Point, SweepResult, read_result
from sweeps.words import winning
from training.fetch import fetch_data
from training.workspace import Workspace, read_json, write_json, write_text

# (kept skill, new one)
PAIRS = {
    "capitals-unit": ("capitals", "unit"),
    "unit-capitals": ("unit", "capitals"),
    "origin-capitals": ("origin", "capitals"),
    "unit-social": ("unit", "social"),
}
FORGETS, KEEPS, SHARE_OF_FULL = 0.95, 0.97, 0.92


def main() -> None:
    arguments = _arguments()
    root = arguments.workspace.resolve()
    skills = arguments.skills or root / "skills"
    if arguments.skills is None:
        write_skills(fetch_data(Workspace.at(root)), skills, arguments.rows, arguments.rows // 2)
    until = time.monotonic() + 60 * arguments.limit
    for pair in arguments.pairs:
        started = time.monotonic()
        full, result = _swept(pair, skills.resolve(), root, until, arguments)
        found = figures(full, result, arguments.out / pair)
        _keep(arguments.out / "figures.json", pair, found | {"seconds": round(time.monotonic() - started)})
        print(json.dumps({pair: found}, indent=1), flush=True)


def _keep(file: Path, pair: str, found: dict[str, Any]) -> None:
    """Write a pair's figures beside those of the others, each with where it was measured."""
    known = read_json(file)["pairs"] if file.is_file() else {}
    write_json(file, {"pairs": {**known, pair: found | where()}})


def _swept(
    pair: str, skills: Path, root: Path, until: float, arguments: argparse.Namespace
) -> tuple[SweepResult, SweepResult]:
    """Teach the kept skill unless it is taught, then sweep over the new one: full tuning alone, and all strategies."""
    kept, new = PAIRS[pair]
    taught = root / "runs" / f"{kept}-1" / "artifact"
    if not taught.is_dir():
        _tenure(root, "train", _write(root / f"{kept}.yaml", teaching(kept, skills, arguments)), until)
    spec = sweep(pair, kept, new, taught, skills, arguments)
    with ThreadPoolExecutor(2 if arguments.at_once else 1) as pool:
        by_rate = full_alone(spec, arguments.full_trials)
        alone = pool.submit(_ended, by_rate, root, until, arguments.out / pair / "full")
        result = pool.submit(_ended, spec, root, until, arguments.out / pair)
        return alone.result(), result.result()


def _ended(spec: dict[str, Any], root: Path, until: float, out: Path) -> SweepResult:
    """Run a sweep to its end, or until it is interrupted; its files are copied to `out`."""
    _tenure(root, "sweep", _write(root / f"{spec['name']}.yaml", spec), until)
    folder = SweepFolder(root / "sweeps" / spec["name"])
    if not folder.shared.is_file():
        sys.exit(f"time was up before {spec['name']} began")
    for file in (folder.spec_yaml, folder.winner, folder.result):
        if file.is_file():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file.name)
    return read_result(folder.result) or gather(folder.read_spec(), folder, ("it was interrupted",))


def teaching(kept: str, skills: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run that teaches the skill which is to be kept."""
    return {
        **_run(kept, arguments.model, skills, arguments),
        "suites": {"target": [_suite(kept, skills)]},
        "contract": {"min_gain": 0.0},
    }


def sweep(pair: str, kept: str, new: str, taught: Path, skills: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The sweep over the new skill, with the kept one as what must be retained."""
    base = _run(new, str(taught), skills, arguments)
    base["suites"] = {"target": [_suite(new, skills)], "retention": [_suite(kept, skills)], "inherit": False}
    return {
        "name": pair,
        "base": base,
        "contract": {"min_gain": 0.0, "max_loss": 0.1, "min_retention": KEEPS},
        "strategies": strategies(str(skills / f"{kept}.train.jsonl")),
        "budget": {"trials": arguments.trials, "hours": arguments.limit / 60 / 2},  # the rest is for finalists
        "rungs": 2,
        "finalists": 3,
        "seeds": [0, 1, 2],
        "trials_per_gpu": arguments.trials_per_gpu,
    }


def full_alone(spec: dict[str, Any], trials: int) -> dict[str, Any]:
    """The same sweep over plain full tuning's rate alone, each to its end whatever it forgets."""
    return {
        **spec,
        "name": f"{spec['name']}-full",
        "contract": {"min_gain": 0.0, "max_loss": 1.0},
        "strategies": [{"name": "full", "tuning": {"type": "full"}, "protections": [], "space": {}}],
        "budget": {**spec["budget"], "trials": trials},
        "scheduler": "none",
        "finalists": 1,
        "alphas": [],
    }


def strategies(kept: str) -> list[dict[str, Any]]:
    """What is tried; `kept` are the kept skill's own training rows, for those that look at them."""
    data = [{"path": kept, "prompt": "prompt", "completion": "answer"}]
    full, lora = {"type": "full"}, {"type": "lora", "rank": 16, "alpha": 32}
    pull = {"protections.0.strength": {"low": 0.01, "high": 10.0, "log": True}}
    share = {"protections.0.share": {"low": 0.1, "high": 0.4}}
    kl = {"protections.0.strength": {"low": 0.1, "high": 3.0, "log": True}}

    def one(name: str, tuning: dict[str, Any], space: dict[str, Any], *protections: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "tuning": tuning, "protections": list(protections), "space": space}

    replay = {"type": "replay", "share": 0.25, "data": data}
    return [
        one("full", full, {}),
        one("full-l2sp", full, pull, {"type": "l2sp", "strength": 0.1}),
        one("full-ewc", full, pull, {"type": "ewc", "strength": 0.1, "data": data}),
        one("full-si", full, pull, {"type": "si", "strength": 0.1, "data": data, "record": False}),
        one("full-kl", full, kl, {"type": "kl", "strength": 1.0}),
        one("full-stm", full, {}, {"type": "stm"}),
        one("full-replay", full, share, replay),
        one("full-replay-ewc", full, share, replay, {"type": "ewc", "strength": 0.1, "data": data}),
        one("lora", lora, {}),
        one("lora-kl", lora, kl, {"type": "kl", "strength": 1.0}),
        one("lora-replay", lora, share, replay),
    ]


def _run(skill: str, model: str, skills: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    source = {"path": str(skills / f"{skill}.train.jsonl"), "prompt": "prompt", "completion": "answer"}
    return {
        "name": skill,
        "model": model,
        "tuning": {"type": "full"},
        "data": {"train": [source]},
        "training": {
            "epochs": 2,
            "learning_rate": 1e-4,
            "global_batch_size": 32,
            "max_length": 512,
            "precision": "fp32" if arguments.cpu else "bf16",
            "validate_every_steps": 0,
        },
        "scaling": {"gpus_per_worker": 0 if arguments.cpu else 1},
    }


def _suite(skill: str, skills: Path) -> dict[str, Any]:
    path = str(skills / f"{skill}.test.jsonl")
    return {"name": skill, "path": path, "metric": "greedy_match", "prompt": "prompt", "completion": "answer"}


def figures(alone: SweepResult, result: SweepResult, out: Path) -> dict[str, Any]:
    """Full tuning at its best rate, the winner over its seeds on validation and on test, and what was aimed at."""
    write_text(out / "front.svg", draw_front(result))
    full, winner = best_full(alone), winning(result)
    test = result.winner.test if result.winner else None
    found: dict[str, Any] = {
        "whole": alone.finished is not None and result.finished is not None,
        "strategies": len(result.strategies),
        "trials": dict(Counter(trial.state for trial in result.searched)),
        "gpu_hours": result.spent.gpu_hours,
        "wall_hours": result.spent.hours,
        "best_full": full and _told(full),
        "winner": winner and _told(winner),
        "winner_on_test": test and _told(test),
        "finalists": [_told(one) for one in result.finalists],
    }
    if full and winner and full.gain.value > 0:
        share = winner.gain.value / full.gain.value
        found |= {
            "winner_share_of_full": share,
            "full_forgets": full.retention.high <= FORGETS,
            "winner_keeps": winner.retention.value >= KEEPS,
            "reached": share >= SHARE_OF_FULL and winner.retention.value >= KEEPS,
        }
    return found


def _told(one: Point | Finalist) -> dict[str, Any]:
    kept = next(suite for suite in one.suites if suite.role == "retention")
    new = next(suite for suite in one.suites if suite.role == "target")
    return {
        "strategy": one.strategy,
        "alpha": one.alpha,
        "gain": one.gain.model_dump(),
        "retention": one.retention.model_dump(),
        "new_skill": [new.base, new.tuned],
        "kept_skill": [kept.base, kept.tuned],
    }


def _write(path: Path, spec: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


def _tenure(root: Path, command: str, spec: Path, until: float) -> None:
    """Run a command of Tenure, interrupted when time is up; a broken or undecided contract (3, 4) is a result, too."""
    whole = [sys.executable, "-m", "cluster", "--workspace", str(root), command, str(spec)]
    status = limited(whole, max(0.0, until - time.monotonic()))
    if status not in (0, 3, 4, INTERRUPTED):
        sys.exit(f"tenure {command} {spec} ended with status {status}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--skills", type=Path, help="A folder of skills that are written already.")
    parser.add_argument("--rows", type=int, default=1600, help="To learn a skill from at most; half as many to test.")
    parser.add_argument("--trials", type=int, default=33)
    parser.add_argument("--full-trials", type=int, default=6, help="Rates at which full tuning alone is tried.")
    parser.add_argument("--trials-per-gpu", type=int, default=4)
    parser.add_argument("--at-once", action="store_true", help="both sweeps of a pair on the same GPU together")
    parser.add_argument("--limit", type=float, default=60.0, help="Minutes for all pairs.")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
