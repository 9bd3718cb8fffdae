"""The same space searched twice for the same GPU time: successive halving that shares, and plain random that does not.

    python -m benchmarks.sweep_search --sweep sweep.yaml --hours 0.5 --workspace DIR --out FILE.json

First `tenure sweep` runs the spec under ASHA with all shared (warm actors, tokenised data, base scores, signals;
WiSE-FT points come with every finished trial). Then random search tries the very settings of that sweep, in the same
order, each as a `tenure train` of its own in a fresh workspace that shares nothing but the model's files, to the end,
for the same tokens, on the same validation suites, until that time is spent. Both hold all the machine's GPUs for
as long as they run, so wall time stands for GPU time. Their hypervolumes over time are compared: when did the sweep
reach what random search had in the end? The sweep is told with its WiSE-FT points and without.

No search runs longer than `--hours` and a tenth; FILE.json is written anew after the sweep and after every run of the
random search, so that one that is cut short has left what it found (`whole: false`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.sweep_overhead import INTERRUPTED, limited, run_sweep, where
from sweeps.folder import SweepFolder
from sweeps.measures import measure
from sweeps.pareto import REFERENCE, Place, volume_over_time
from sweeps.space import draw, run_spec
from sweeps.trial import settle
from training.errors import TenureError
from training.evaluation.scorecard import read_scorecard
from training.workspace import Workspace, write_json

PATIENCE = 1.1  # a sweep ends by its budget of hours; what came before the first trial is not in that
Timed = tuple[float, Place]
Curve = Sequence[tuple[float, float]]  # (seconds, hypervolume), both ascending


def main() -> None:
    arguments = _arguments()
    root = arguments.workspace.resolve()
    shared = Workspace.at(root / "shared")
    _with_models(shared, arguments.models)
    seconds = 3600 * arguments.hours
    given = yaml.safe_load(arguments.sweep.read_text(encoding="utf-8"))
    given |= {
        "name": "asha",
        "base": str((arguments.sweep.parent / given["base"]).resolve()),
        "search": "random",
        "scheduler": "asha",
        "finalists": 0,
    }
    given["budget"] = {"trials": arguments.trials, "hours": arguments.hours}
    started = time.time()
    wall, _ = run_sweep(given, shared.root, PATIENCE * seconds)
    folder = SweepFolder(shared.root / "sweeps" / "asha")
    halving = {
        "wall_seconds": wall,
        "trials": sum(1 for _ in folder.records()),
        "points": sweep_points(folder, started),
    }
    random: list[Timed | None] = []
    _tell(arguments, told(halving, random, seconds, whole=False))
    if folder.shared.is_file():
        for tried in random_points(folder, root, arguments.models, seconds, arguments.trials):
            random.append(tried)
            _tell(arguments, told(halving, random, seconds, whole=False))
    found = told(halving, random, seconds, whole=True)
    _tell(arguments, found)
    print(json.dumps(found, indent=1))


def _tell(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.out:
        write_json(arguments.out, found)


def told(halving: dict[str, Any], random: Sequence[Timed | None], seconds: float, *, whole: bool) -> dict[str, Any]:
    """What both searches came to; a run of the random search that failed, or ended too late, is None."""
    points = halving["points"]
    found: dict[str, Any] = {
        "whole": whole,
        "seconds_each": seconds,
        "reference": REFERENCE,
        "asha": {**halving, **curve(_places(points, wise=True))},
        "asha_without_wise": curve(_places(points, wise=False)),
        "random": {"trials": len(random), **curve([one for one in random if one])},
    }
    for name in ("asha", "asha_without_wise"):
        found[f"{name}_against_random"] = compared(found[name]["volume"], found["random"]["volume"], seconds)
    return found | where()


def sweep_points(folder: SweepFolder, started: float) -> list[tuple[float, float | None, Place]]:
    """(seconds since the start, alpha, place) of every point of a sweep; a trial's are there with its record."""
    found = []
    for record in folder.records():
        at = (folder.trials / f"{record.trial.name}.json").stat().st_mtime - started
        found += [(at, point.alpha, (point.gain.value, point.retention.value)) for point in record.points]
    return found


def _places(points: Sequence[tuple[float, float | None, Place]], wise: bool) -> list[Timed]:
    return [(at, place) for at, alpha, place in points if wise or alpha is None]


def random_points(folder: SweepFolder, root: Path, models: Path, seconds: float, trials: int) -> Iterator[Timed | None]:
    """(seconds since the start, place) of settings that are trained one after the other, sharing nothing."""
    sweep, tokens, suites = folder.read_spec(), folder.read_shared().tokens_per_trial, folder.read_shared().validation
    started = time.monotonic()
    for number in range(trials):
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            return
        workspace = Workspace.at(root / "random" / f"trial-{number:03d}")
        _with_models(workspace, models)
        spec = run_spec(sweep, draw(sweep, number), name="random", suites=suites)
        planning = time.monotonic()
        spec, _, _ = settle(spec, tokens, workspace)
        started += time.monotonic() - planning  # how many steps that is would be known to who searches by hand
        place = _trained(spec.model_dump(mode="json", exclude_none=True), workspace, left)
        yield None if place is None else (time.monotonic() - started, place)
        shutil.rmtree(workspace.root, ignore_errors=True)


def _trained(spec: dict[str, Any], workspace: Workspace, limit_s: float) -> Place | None:
    """Train and score a run in a process of its own; None when it failed, or was not done within the limit."""
    file = workspace.root / "run.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "cluster", "--workspace", str(workspace.root), "train", str(file)]
    if limited(command, limit_s, stdout=subprocess.DEVNULL) == INTERRUPTED:
        return None
    try:
        measures = measure(read_scorecard(workspace.run("random-1").scorecard))
    except TenureError:
        return None
    return measures.gain.value, measures.retention.value


def _with_models(workspace: Workspace, models: Path) -> None:
    workspace.cache.mkdir(parents=True, exist_ok=True)
    if models.is_dir() and not workspace.models.exists():
        workspace.models.symlink_to(models.resolve())


def curve(timed: Sequence[Timed]) -> dict[str, Any]:
    return {"points": len(timed), "volume": volume_over_time(timed)}


def compared(ours: Curve, theirs: Curve, seconds: float) -> dict[str, float | None]:
    """When ours reached the last volume of theirs, and the ratio of times; None where it never did, or none is."""
    final = theirs[-1][1] if theirs else 0.0
    reached = next((at for at, volume in ours if volume >= final > 0), None)
    own = theirs[-1][0] if final > 0 else None
    return {
        "random_volume": final,
        "random_reached_it_at": own,
        "reached_at": reached,
        "share_of_budget": None if reached is None else reached / seconds,
        "share_of_randoms_time": None if reached is None or own is None else reached / own,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sweep", type=Path, required=True, help="The spec of a sweep, whose base is a path.")
    parser.add_argument("--hours", type=float, required=True, help="For each of both searches.")
    parser.add_argument("--workspace", type=Path, required=True, help="An empty folder.")
    parser.add_argument("--models", type=Path, default=Path("workspace/cache/models"), help="Where models lie.")
    parser.add_argument("--trials", type=int, default=1000, help="At most so many in each.")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
