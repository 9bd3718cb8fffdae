"""Runs whose processes are killed at random moments, and whether they end as an undisturbed one does.

    python -m benchmarks.run_kills --kills 50 --out benchmarks/results/run-kills.json

A small run (a byte-level model, two workers at ZeRO 2, a checkpoint every third step) is made undisturbed. Then others
of the same spec are made, and at moments drawn by a seed a process of theirs is ended by SIGKILL: a worker, Ray Train's
controller, the raylet, the GCS (whose state is in memory here: Ray keeps it elsewhere only in Redis), or the driver.
What ends with an error is taken up with `tenure resume`, as often as it needs. Told of every run is whether its weights
equal the undisturbed run's bit for bit, whether every step that counts fed the same examples, whether a half-written
checkpoint could be found by a reader, and how many processes of it were still there when it had ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sweep_overhead import where
from training.checkpoint import find_damage
from training.data.seen import read_seen
from training.events import read_events
from training.workspace import RunFolder, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from commands import Command, last_step  # type: ignore[import-not-found]  # of the tests
from jobs import LONG, TWO_WORKERS, artifact_weights, write_spec  # type: ignore[import-not-found]
from tiny import make_tiny_model

TITLES = {"worker": "RayTrainWorker", "controller": "TrainController", "raylet": "raylet/raylet", "gcs": "gcs_server"}
KINDS = (*TITLES, "driver")
# A driver whose GCS is gone gives up after these seconds, by itself after a minute.
QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
_MOST_RESUMES = 6
_WAIT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-a-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ |= QUICK
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        spec = write_run(Path(scratch), 20 * arguments.kills_a_run)
        workspace = Path(scratch) / "workspace"
        wanted = undisturbed(spec, workspace)
        runs: list[dict[str, Any]] = []
        while count(runs) < arguments.kills:
            runs.append(killed(spec, workspace, f"killed-{len(runs)}", draws(draw, arguments.kills_a_run), wanted))
            told: dict[str, Any] = {"kills": count(runs), "seed": arguments.seed}
            told |= {name: sum(one[name] for one in runs) for name in ("same_weights", "same_examples")}
            write_json(arguments.out, {**told, "of_runs": len(runs), "runs": runs, **where()})
            print(json.dumps(runs[-1]), flush=True)


def count(runs: list[dict[str, Any]]) -> int:
    """The kills that found a process; where there was none, one killed before had taken it along."""
    return sum(kill["found"] for one in runs for kill in one["kills"])


def draws(draw: random.Random, count: int) -> list[tuple[str, int]]:
    """What to kill, and after how many more steps."""
    return [(draw.choice(KINDS), draw.randrange(1, 16)) for _ in range(count)]


def write_run(folder: Path, steps: int) -> Path:
    training = LONG | {"epochs": steps, "max_steps": steps, "checkpoint_every_steps": 3, "log_examples": True}
    training |= {"validate_every_steps": 0}
    model = make_tiny_model(folder / "tiny")
    return Path(write_spec(folder, model, training=training, scaling=TWO_WORKERS | {"max_failures": 2}))


def undisturbed(spec: Path, workspace: Path) -> RunFolder:
    command = Command.start("train", spec, "--id", "undisturbed", workspace=workspace)
    status = command.finish(_WAIT_S)
    if status not in (0, 3):
        sys.exit(f"the undisturbed run ended with status {status}\n{command.out}\n{command.err}")
    return RunFolder(workspace / "runs" / "undisturbed")


def killed(
    spec: Path, workspace: Path, run_id: str, moments: list[tuple[str, int]], wanted: RunFolder
) -> dict[str, Any]:
    """A run with a process killed at each moment, taken up until it ends; and how it compares."""
    run = RunFolder(workspace / "runs" / run_id)
    command = Command.start("train", spec, "--id", run_id, workspace=workspace)
    kills, resumes, left = [], 0, 0
    for kind, after in moments:
        command, more, status, remains = until(run, command, after)
        resumes, left = resumes + more, left + remains
        if status is not None:
            break
        step = last_step(run)
        kills.append({"kind": kind, "step": step, "found": kill(command, kind)})
    status, tries = finish(command), 0
    left += len(remaining(command))
    while status not in (0, 3) and tries < _MOST_RESUMES:
        tries += 1
        command = Command.start("resume", run_id, workspace=workspace)
        status = finish(command)
        left += len(remaining(command))
    return {"run": run_id, "kills": kills, "resumes": resumes + tries, "status": status, **compare(run, wanted)} | {
        "processes_left": left,
        "attempts": sum(event["event"] == "attempt" for event in read_events(run)),
    }


def until(run: RunFolder, command: Command, after: int) -> tuple[Command, int, int | None, int]:
    """Wait for so many more steps, taking the run up where it ended with an error.

    The command that works on it now, how often it was taken up, its status if it is done, and the processes left over.
    """
    target, resumes, left = done_steps(run) + after, 0, 0
    deadline = time.monotonic() + _WAIT_S
    while done_steps(run) < target and time.monotonic() < deadline:
        if command.process.poll() is not None:
            status = finish(command)
            left += len(remaining(command))
            if status in (0, 3) or resumes == _MOST_RESUMES:
                return command, resumes, status, left
            run_begun = run.spec.is_file()
            again = ("resume", run.id) if run_begun else ("train", run.path.parent.parent.parent / "spec.yaml")
            given = () if run_begun else ("--id", run.id)
            command, resumes = Command.start(*again, *given, workspace=run.path.parent.parent), resumes + 1
        time.sleep(0.02)
    return command, resumes, None, left


def done_steps(run: RunFolder) -> int:
    return int(last_step(run)) if run.metrics.is_file() else 0


def kill(command: Command, kind: str) -> bool:
    """SIGKILL one process of that kind; whether there was one."""
    if kind == "driver":
        command.process.kill()
        return True
    found = [process for process in command.survivors() if TITLES[kind] in title(process)]
    if found:
        found[-1].kill()
    return bool(found)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def finish(command: Command) -> int:
    """The exit status of a command; what it started is given its time to end by itself."""
    command.out, command.err = command.process.communicate(timeout=_WAIT_S)
    return int(command.process.returncode)


def remaining(command: Command, patience_s: float = 30.0) -> list[str]:
    """The processes of an ended command that are there after some patience; they are ended then."""
    deadline = time.monotonic() + patience_s
    while (left := command.survivors()) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = [title(process)[:80] for process in left]
    for process in left:
        process.kill()
    return names


def compare(run: RunFolder, wanted: RunFolder) -> dict[str, bool]:
    if not run.artifact.is_dir():
        return {"same_weights": False, "same_examples": False, "only_whole_checkpoints": False}
    given, expected = artifact_weights(run.artifact), artifact_weights(wanted.artifact)
    same = given.keys() == expected.keys() and all(bool((given[name] == expected[name]).all()) for name in expected)
    return {
        "same_weights": same,
        "same_examples": read_seen(run.examples) == read_seen(wanted.examples),
        "only_whole_checkpoints": not any(find_damage(path) for path in run.checkpoints.glob("step-*")),
    }


if __name__ == "__main__":
    main()
