"""Where the wall time of a sweep of short trials goes: training steps and scoring against all the rest.

    python -m benchmarks.sweep_overhead --base run.yaml --workspace DIR --out benchmarks/results/sweep-overhead.json

Runs `tenure sweep` over the given base run (a spec whose data and suites exist) with `--trials` random settings, no
early stopping and no finalists, `--at-once` trials side by side, in a process of its own. What each trial spent on
planning, setup, steps, export, scoring and tracking comes from its record; what is left of the wall time (times the
trials side by side) is the rest: the start of Ray and of the actors, what is shared, and idling. A sweep that takes
longer than `--limit` minutes is interrupted, and told as far as it came.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sweeps.folder import SweepFolder
from training.workspace import write_json

USEFUL = ("steps", "scoring")
INTERRUPTED, GRACE_S = 130, 30.0


def main() -> None:
    arguments = _arguments()
    sweep = {
        "name": f"overhead-{os.getpid()}",
        "base": str(arguments.base.resolve()),
        "preset": "quick",
        "search": "random",
        "scheduler": "none",
        "finalists": 0,
        "budget": {"trials": arguments.trials},
        "trials_at_once": arguments.at_once,
        **({"tokens_per_trial": arguments.tokens} if arguments.tokens else {}),
    }
    wall, whole = run_sweep(sweep, arguments.workspace, 60 * arguments.limit)
    folder = SweepFolder(arguments.workspace.resolve() / "sweeps" / str(sweep["name"]))
    records = list(folder.records())
    found = {
        "whole": whole,
        "trials": len(records),
        "states": [record.trial.state for record in records],
        "tokens": sum(record.trial.tokens for record in records),
        "at_once": arguments.at_once,
        **breakdown(wall, arguments.at_once, [record.timings for record in records]),
        **where(),
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        write_json(arguments.out, found)


def breakdown(wall: float, at_once: int, timings: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Seconds and shares of the time that was held (wall times trials side by side), by part, and the useful share."""
    held = wall * at_once
    names = list(dict.fromkeys(name for one in timings for name in one))
    seconds = {name: sum(one.get(name, 0.0) for one in timings) for name in names}
    seconds["rest"] = held - sum(seconds.values())
    return {
        "wall_seconds": wall,
        "seconds": seconds,
        "shares": {name: part / held for name, part in seconds.items()},
        "useful_share": sum(seconds.get(name, 0.0) for name in USEFUL) / held,
    }


def run_sweep(sweep: Mapping[str, Any], workspace: Path, limit_s: float) -> tuple[float, bool]:
    """Run a sweep by the command line; its wall seconds, and whether it came to its end within the limit.

    One without a winner (status 3) is a sweep all the same.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    file = workspace / f"{sweep['name']}.yaml"
    file.write_text(yaml.safe_dump(dict(sweep), sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    status = limited([sys.executable, "-m", "cluster", "--workspace", str(workspace), "sweep", str(file)], limit_s)
    if status not in (0, 3, INTERRUPTED):
        sys.exit(f"the sweep ended with status {status}")
    return time.monotonic() - started, status != INTERRUPTED


def limited(command: Sequence[str], limit_s: float, **options: Any) -> int:
    """Run a command; its status, or INTERRUPTED (130) where it took longer and was interrupted as by ctrl-c."""
    if threading.current_thread() is threading.main_thread():  # what a shell starts in the background ignores ctrl-c
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, **options)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return INTERRUPTED


def where() -> dict[str, Any]:
    """Device, versions and commit."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("torch", "ray", "deepspeed", "transformers", "peft")
    return {"device": device, "versions": {name: version(name) for name in packages}, "commit": commit.stdout.strip()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="A run spec of one worker.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--tokens", type=int, help="Tokens a trial. Default: what the base run takes.")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60.0, help="Minutes after which the sweep is interrupted.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
