"""The `quick` sweep of the examples on this machine: how long it takes, and which strategies stand on its front.

    python -m benchmarks.sweep_quick --workspace WORKSPACE --out benchmarks/results/sweep-quick.json

Runs `tenure sweep examples/sweep/quick.yaml` (SmolLM2-135M-Instruct on sentences of Tatoeba, seven strategies,
finalists under two seeds) under a name of its own. Fetch the model and write the data first: `tenure fetch`, then
`python examples/demo/prepare.py WORKSPACE`. After `--limit` minutes the sweep is interrupted, and told as far as it
came.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.sweep_overhead import run_sweep, where
from sweeps.folder import Record, SweepFolder
from sweeps.gather import gather
from sweeps.pareto import hypervolume, on_validation, pareto_front, place_of
from sweeps.result import Finalist, Point, SweepResult, read_result
from training.workspace import write_json

SPEC = Path(__file__).resolve().parents[1] / "examples" / "sweep" / "quick.yaml"


def main() -> None:
    arguments = _arguments()
    name = f"quick-{os.getpid()}"
    given = yaml.safe_load(arguments.sweep.read_text(encoding="utf-8"))
    given |= {"name": name, "base": str((arguments.sweep.parent / given["base"]).resolve())}
    wall, whole = run_sweep(given, arguments.workspace, 60 * arguments.limit)
    folder = SweepFolder(arguments.workspace.resolve() / "sweeps" / name)
    result = read_result(folder.result) or gather(folder.read_spec(), folder)
    found = {"whole": whole, "wall_minutes": wall / 60, **told(result, list(folder.records())), **where()}
    print(json.dumps(found, indent=1))
    write_json(arguments.out, found)


def told(result: SweepResult, records: Sequence[Record]) -> dict[str, Any]:
    """Strategies tried, the front and who stands on it, finalists and winner, seconds by part over all trials."""
    front = pareto_front(on_validation(result.points))
    parts = dict.fromkeys(name for record in records for name in record.timings)
    return {
        "strategies": result.strategies,
        "trials": dict(Counter(trial.state for trial in result.searched)),
        "strategies_on_the_front": sorted({point.strategy for point in front}),
        "front": [_placed(point) for point in front],
        "hypervolume": hypervolume([place_of(point) for point in front]),
        "finalists": [_placed(one) for one in result.finalists],
        "winner": result.winner and [result.winner.strategy, result.winner.alpha],
        "winner_on_test": result.winner and result.winner.test and _placed(result.winner.test),
        "seconds": {name: sum(record.timings.get(name, 0.0) for record in records) for name in parts},
    }


def _placed(one: Point | Finalist) -> dict[str, Any]:
    return {
        "strategy": one.strategy,
        "alpha": one.alpha,
        "gain": one.gain.model_dump(),
        "retention": one.retention.model_dump(),
        "contract": one.contract,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", type=Path, default=SPEC, help="Another sweep, whose base is a path.")
    parser.add_argument("--limit", type=float, default=60.0, help="Minutes after which the sweep is interrupted.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
