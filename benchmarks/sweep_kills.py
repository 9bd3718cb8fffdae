"""A sweep whose driver is killed at random moments, again and again, and what is left of it each time.

    python -m benchmarks.sweep_kills --kills 10 --out benchmarks/results/sweep-kills.json

A small sweep (a byte-level model, four trials, two finalists' seeds) runs once undisturbed on a Ray cluster of its own.
Then it runs again under a fresh name once a kill: its driver is ended by SIGKILL at a moment drawn evenly from the
undisturbed run's time, and `tenure sweep --resume` goes on with it. Told is whether each ended with the same finished
trials and the same winner, how many trials were worked on more than once, and what of the killed driver was still there
half a minute later: placement groups, claimed processors, working processes. OUT is written anew after every kill; no
kill is begun after `--limit` minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.sweep_overhead import where
from sweeps.folder import SweepFolder
from sweeps.result import read_result
from training.workspace import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import make_tiny_model
from tiny_spec import sums, write_rows, write_tiny_spec  # type: ignore[import-not-found]  # of the tests

PATIENCE_S = 30.0
OPEN = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # the cluster and all that speak to it, on this machine alone


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--limit", type=float, default=120.0, help="Minutes after which no more kills begin.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the Ray cluster with it
    until = time.monotonic() + 60 * arguments.limit
    with tempfile.TemporaryDirectory() as scratch, ray_head(Path(scratch)) as address:
        base = write_base(Path(scratch))
        run(base, "first", address)  # what the workspace keeps for all sweeps is not timed
        started = time.monotonic()
        run(base, "undisturbed", address)
        seconds, wanted = time.monotonic() - started, outcome(base, "undisturbed")
        print(json.dumps({"undisturbed_seconds": seconds, **wanted}), flush=True)
        draw = random.Random(arguments.seed)
        kills: list[dict[str, Any]] = []
        for number in range(arguments.kills):
            if time.monotonic() > until:
                break
            kills.append(killed(base, f"killed-{number}", address, draw.uniform(0, seconds), wanted))
            told = {"undisturbed_seconds": seconds, "outcome": wanted, "same": sum(one["same"] for one in kills)}
            write_json(arguments.out, {**told, "kills": kills, **where()})


@contextmanager
def ray_head(scratch: Path) -> Iterator[str]:
    """A Ray cluster of this machine, which outlives the drivers that connect to it; it ends with its own processes.

    Its folder is its own, or every ray.init() of this machine would find it.
    """
    port = str(random.randint(20000, 30000))
    ray = str(Path(sys.executable).with_name("ray"))
    where = ["--port", port, "--temp-dir", str(scratch / "ray"), "--num-cpus", "2", "--include-dashboard", "false"]
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", *where], env=OPEN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"127.0.0.1:{port}"
    try:
        expect_up(ray, address)
        yield address
    finally:
        head.terminate()
        head.wait()


def expect_up(ray: str, address: str) -> None:
    """Wait for a cluster to answer, ten minutes at most: machines that do other work take long."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        asked = subprocess.run(
            [ray, "health-check", "--address", address], env=OPEN, check=False, capture_output=True, text=True
        )
        if asked.returncode == 0:
            return
        time.sleep(2)
    sys.exit(f"no Ray came up at {address}: {asked.stderr.strip().splitlines()[-1:]}")


def write_base(folder: Path) -> Path:
    write_tiny_spec(folder, make_tiny_model(folder / "tiny"), training={"epochs": 2}, scaling={"zero_stage": 0})
    write_rows(folder / "sums.jsonl", sums(24))
    return folder


def write_sweep(base: Path, name: str) -> Path:
    rate = {"training.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}}
    strategies = [{"name": kind, "tuning": {"type": kind}, "space": rate} for kind in ("full", "lora")]
    sweep = {"name": name, "base": "spec.yaml", "strategies": strategies, "budget": {"trials": 4}, "rungs": 2}
    sweep |= {"scheduler": "none", "finalists": 1, "seeds": [0, 1], "contract": {"max_loss": 100.0}, "alphas": [0.5]}
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


def command(base: Path, address: str, *given: str) -> list[str]:
    workspace = str(base / "workspace")
    return [
        sys.executable,
        "-m",
        "cluster",
        "--workspace",
        workspace,
        "sweep",
        *given,
        "--address",
        address,
    ]


def run(base: Path, name: str, address: str) -> None:
    done = subprocess.run(
        command(base, address, str(write_sweep(base, name))), env=OPEN, check=False, capture_output=True, text=True
    )
    if done.returncode not in (0, 3):
        sys.exit(f"the sweep ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")


def killed(base: Path, name: str, address: str, after_s: float, wanted: dict[str, Any]) -> dict[str, Any]:
    """Kill a sweep's driver after so many seconds, look at what is left, and resume it to its end."""
    driver = subprocess.Popen(
        command(base, address, str(write_sweep(base, name))),
        env=OPEN,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        driver.wait(after_s)
    except subprocess.TimeoutExpired:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    left = leftovers(address)
    folder = SweepFolder(base / "workspace" / "sweeps" / name)
    state = resumed(base, name, address) if folder.spec.is_file() else begun_again(base, name, address, folder)
    found = outcome(base, name)
    told = {
        "after_seconds": after_s,
        "killed": driver.returncode == -signal.SIGKILL,
        "resumed": state,
        "same": found == wanted,
        "left_behind": left,
    }
    attempts = [record.trial.attempts for record in folder.records()]
    print(json.dumps(told), flush=True)
    return told | {"begun_again": sum(number > 1 for number in attempts), "outcome": None if found == wanted else found}


def resumed(base: Path, name: str, address: str) -> str:
    done = subprocess.run(
        command(base, address, "--resume", name), env=OPEN, check=False, capture_output=True, text=True
    )
    return "resumed" if done.returncode in (0, 3) else f"status {done.returncode}: {done.stderr[-500:]}"


def begun_again(base: Path, name: str, address: str, folder: SweepFolder) -> str:
    """A sweep that was killed before its spec was kept has nothing to go on with, and is started."""
    if folder.path.exists():
        folder.path.rename(folder.path.with_name(f"{name}.torn"))
    run(base, name, address)
    return "begun again"


def outcome(base: Path, name: str) -> dict[str, Any]:
    """The finished trials and the winner."""
    result = read_result(base / "workspace" / "sweeps" / name / "result.json")
    if result is None:
        return {"finished": [], "winner": None}
    winner = result.winner and [result.winner.trial, result.winner.alpha]
    finished = sorted(trial.name for trial in result.trials if trial.state == "finished")
    return {"finished": finished, "winner": winner}


_LOOK = """
import json, ray
from ray.util import placement_group_table
ray.init(address={address!r}, log_to_driver=False, logging_level="error")
groups = [one for one in placement_group_table().values() if one["state"] not in ("REMOVED",)]
held = {{k: ray.cluster_resources()[k] - ray.available_resources().get(k, 0) for k in ("CPU",)}}
print(json.dumps({{"placement_groups": len(groups), "cpus_held": round(held["CPU"], 2)}}))
"""


def leftovers(address: str) -> dict[str, Any]:
    """Placement groups, claimed processors and working processes that are still there after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    found: dict[str, Any] = {}
    while time.monotonic() < deadline:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK.format(address=address)], env=OPEN, check=True, capture_output=True, text=True
        )
        found = {**json.loads(done.stdout.strip().splitlines()[-1]), "processes": working_processes(address)}
        if not any(found.values()):
            return found
        time.sleep(1)
    return found


def working_processes(address: str) -> int:
    """Processes of a cluster that work on an actor or a task; Ray's own, and those that wait for work, are none."""
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess):
            name = " ".join(process.info["cmdline"] or ())
            works = name.startswith("ray::") and not name.startswith("ray::IDLE") and "Agent" not in name
            found += works and any(belongs(parent.cmdline(), address) for parent in process.parents())
    return found


def belongs(cmdline: list[str], address: str) -> bool:
    """Whether a process is the node of a cluster, which Ray calls by the machine's own address."""
    port = address.rpartition(":")[2]
    return any(part.startswith("--gcs-address=") and part.endswith(f":{port}") for part in cmdline)


if __name__ == "__main__":
    main()
