"""Runs whose processes are killed at random moments, and whether they end as an undisturbed one does.

    python -m benchmarks.run_kills --kills 50 --out benchmarks/results/run-kills.json

A small run (a byte-level model, two workers at ZeRO 2, a checkpoint every third step) is made undisturbed. Then others
of the same spec are made, and at moments drawn by a seed a process of theirs is ended by SIGKILL: a worker, Ray Train's
controller, the raylet, the driver, or the GCS, which keeps its state on disk (Ray's RocksDB storage) and is started
again after a second, as a supervisor would. Half of the moments are counted in training steps; the others in seconds,
and fall into starts, recoveries and scoring too. What ends with an error is taken up with `tenure resume`, as often as
it needs.
Told of every run is whether its weights equal the undisturbed run's bit for bit, whether every step that counts fed the
same examples, whether a half-written checkpoint could be found by a reader, and which processes of it were still there
half a minute after a driver had ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
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

TITLES = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "raylet": "/raylet",
    "gcs": "/gcs_server",
}
KINDS = (*TITLES, "driver")
DONE = (0, 3, 4)
_MOST_STARTS = 60
_WAIT_S = 300.0
_GCS_AWAY_S = 1.0


@dataclass(frozen=True)
class Moment:
    """What to kill, and after how many more steps or, where these are none, seconds."""

    kind: str
    steps: int
    seconds: float


@dataclass
class Disturbed:
    """A run, the command that works on it now, and what was seen of it so far."""

    run: RunFolder
    spec: Path
    command: Command
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 1
    left: list[str] = field(default_factory=list)
    revived: list[subprocess.Popen[bytes]] = field(default_factory=list)
    status: int | None = None

    @property
    def steps(self) -> int:
        return int(last_step(self.run)) if self.run.metrics.is_file() else 0


def main() -> None:
    arguments = _arguments()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        spec = write_run(Path(scratch), arguments.steps)
        workspace = Path(scratch) / "workspace"
        started = time.monotonic()
        wanted = undisturbed(spec, workspace)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        runs: list[dict[str, Any]] = []
        while (missing := arguments.kills - sum(len(one["kills"]) for one in runs)) > 0:
            moments = [a_moment(draw) for _ in range(min(missing, arguments.kills_a_run))]
            started = time.monotonic()
            told = disturbed(spec, workspace, f"killed-{len(runs)}", moments, draw, wanted)
            runs.append({**told, "seconds": round(time.monotonic() - started)})
            write_json(arguments.out, {**summary(runs), "seed": arguments.seed, "runs": runs, **where()})
            print(json.dumps(runs[-1]), flush=True)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all runs: how many were killed of each kind, and of how many what was promised held."""
    kills = [kill["kind"] for one in runs for kill in one["kills"]]
    held = ("ended", "same_weights", "same_examples", "only_whole_checkpoints", "no_orphans")
    return {
        "kills": len(kills),
        "of_kind": dict(sorted(Counter(kills).items())),
        "of_runs": len(runs),
        **{name: sum(one[name] for one in runs) for name in held},
    }


def a_moment(draw: random.Random) -> Moment:
    by_steps = draw.random() < 0.5
    return Moment(draw.choice(KINDS), draw.randrange(1, 40) if by_steps else 0, draw.uniform(0, 8))


def write_run(folder: Path, steps: int) -> Path:
    training = LONG | {"epochs": steps, "max_steps": steps, "checkpoint_every_steps": 3, "log_examples": True}
    training |= {"validate_every_steps": 0}
    model = make_tiny_model(folder / "tiny")
    return Path(write_spec(folder, model, training=training, scaling=TWO_WORKERS | {"max_failures": 2}))


def undisturbed(spec: Path, workspace: Path) -> RunFolder:
    command = start("train", spec, "--id", "undisturbed", workspace=workspace)
    out, err = command.process.communicate(timeout=_WAIT_S)
    if command.process.returncode not in DONE:
        sys.exit(f"the undisturbed run ended with status {command.process.returncode}\n{out}\n{err}")
    return RunFolder(workspace / "runs" / "undisturbed")


def start(*arguments: str | Path, workspace: Path) -> Command:
    """The command line with a Ray of its own, whose GCS keeps its state in a folder of its own."""
    # In memory where that can be: these processes die, and not the machine.
    state = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else workspace.parent, prefix="gcs-"))
    os.environ |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(state)}
    return Command.start(*arguments, workspace=workspace)


def disturbed(
    spec: Path, workspace: Path, run_id: str, moments: list[Moment], draw: random.Random, wanted: RunFolder
) -> dict[str, Any]:
    """A run with a process killed at each moment, taken up until it ends; and how it compares."""
    run = RunFolder(workspace / "runs" / run_id)
    one = Disturbed(run, spec, start("train", spec, "--id", run_id, workspace=workspace))
    for moment in moments:
        wait_for(one, moment)
        if one.status is not None or not kill(one, moment.kind, draw):
            break
    while one.status is None:
        time.sleep(0.1)
        take_up(one)
    return {"run": run_id, "kills": one.kills, "status": one.status, **compare(run, wanted)} | {
        "ended": one.status in DONE,
        "no_orphans": not one.left,
        "left": one.left,
        "drivers": one.starts,
        "attempts": sum(event["event"] == "attempt" for event in read_events(run)),
    }


def wait_for(one: Disturbed, moment: Moment) -> None:
    """Until so many more steps are done, or seconds are over; what ends with an error meanwhile is taken up."""
    target, until = one.steps + moment.steps, time.monotonic() + (_WAIT_S if moment.steps else moment.seconds)
    while time.monotonic() < until and one.status is None:
        if moment.steps and one.steps >= target:
            return
        time.sleep(0.02)
        take_up(one)


def take_up(one: Disturbed) -> None:
    """Where the command has ended: keep its status if the run is done, else begin or resume it again."""
    if one.command.process.poll() is None:
        return
    ended(one)
    if one.command.process.returncode in DONE or one.starts == _MOST_STARTS:
        one.status = one.command.process.returncode
        return
    begun = one.run.spec.is_file()
    again = ("resume", one.run.id) if begun else ("train", one.spec, "--id", one.run.id)
    one.command, one.starts = start(*again, workspace=one.run.path.parent.parent), one.starts + 1


def ended(one: Disturbed) -> None:
    """What a driver that has ended leaves behind: its words, and after some patience its processes."""
    for process in one.revived:
        process.kill()
        process.wait()
    one.revived.clear()
    one.command.out, one.command.err = one.command.process.communicate(timeout=_WAIT_S)
    one.left += remaining(one.command)
    if one.command.process.returncode not in DONE:
        print(f"  {one.run.id}: {one.command.process.returncode} {one.command.err.strip()[-300:]}", flush=True)


def remaining(command: Command, patience_s: float = 30.0) -> list[str]:
    """The processes of an ended command that are there after some patience; they are ended then."""
    deadline = time.monotonic() + patience_s
    while (left := command.survivors()) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = [" ".join(argv(process))[:80] for process in left]
    for process in left:
        process.kill()
    return names


def kill(one: Disturbed, kind: str, draw: random.Random) -> bool:
    """SIGKILL a process of that kind, as soon as there is one; False where the run ended before there was."""
    while one.status is None:
        found = processes(one.command, kind)
        if found:
            told = {"kind": kind, "step": one.steps, "driver": one.starts}
            victim = draw.choice(sorted(found, key=lambda process: int(process.pid)))
            if kind == "gcs":
                restart(one, victim)
            else:
                victim.kill()
            one.kills.append(told)
            print(f"  {one.run.id}: {told}", flush=True)
            return True
        time.sleep(0.05)
        take_up(one)
    return False


def restart(one: Disturbed, gcs: psutil.Process) -> None:
    """SIGKILL a GCS and start it again, on its port and with its state."""
    command, environment, folder = argv(gcs), gcs.environ(), gcs.cwd()
    ports = {c.laddr.port for c in gcs.net_connections() if c.status == psutil.CONN_LISTEN}
    known = {
        int(part.rpartition(":")[2])
        for p in processes(one.command, "raylet")
        for part in argv(p)
        if part.startswith("--gcs-address=")
    }
    port = next(iter(ports & known), None)
    gcs.kill()
    time.sleep(_GCS_AWAY_S)
    again = [
        f"--gcs_server_port={port}" if port and part.startswith("--gcs_server_port=") else part for part in command
    ]
    quiet = subprocess.DEVNULL
    one.revived.append(subprocess.Popen(again, env=environment, cwd=folder, stdout=quiet, stderr=quiet))


def processes(command: Command, kind: str) -> list[psutil.Process]:
    """The processes of a command of one kind; Ray's own are known by their program, its actors by their title."""
    if kind == "driver":
        return [psutil.Process(command.process.pid)] if command.process.poll() is None else []
    return [process for process in command.survivors() if TITLES[kind] in (argv(process) or [""])[0]]


def argv(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-a-run", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600, help="Of every run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
