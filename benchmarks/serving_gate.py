"""What a streamed token costs the gate: processor time of its process, between a stand-in engine and clients.

    python -m benchmarks.serving_gate --out benchmarks/results/serving-gate.json
    python -m benchmarks.serving_gate --against OTHER_CHECKOUT --out OUT.json

The engine is a process that sends events as vLLM words them, one a stream every --tick-ms to all streams at once, as an
engine's steps do; the clients are another. The gate is the endpoint's own, with a key, on uvloop as in Ray's replicas.
Processor time is counted, not the clock, so that what else the machine does weighs little. Another checkout's gate
(the same code at another commit) is measured by turns with this one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Load, Server, ask_from_here
from benchmarks.serving_stand_in import FILTERS, ROOT, running


def main() -> None:
    arguments = parse()
    trees = {"this": ROOT} | ({"other": arguments.against.resolve()} if arguments.against else {})
    tick = ("--tick-ms", str(arguments.tick_ms))
    with tempfile.TemporaryDirectory() as made, running("engine", *tick) as (_, engine):
        rows = [row for filters in FILTERS for row in measure(trees, engine, filters, Path(made), arguments)]
    load = {"tokens": arguments.tokens, "tick_ms": arguments.tick_ms, "repeats": arguments.repeats}
    told = {"machine": _machine(), "commits": {name: _commit(tree) for name, tree in trees.items()}, "load": load}
    arguments.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose gate is measured by turns with this one")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="events of one answer")
    parser.add_argument("--tick-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measure(
    trees: dict[str, Path], engine: str, filters: str, made: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for every concurrency: microseconds of the gate's processor time an event, by checkout."""
    for count in arguments.concurrency:
        found: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(arguments.repeats):
            for name, tree in trees.items():
                folder = made / f"{filters}-{count}-{turn}-{name}"
                folder.mkdir()
                (folder / "replicas").write_text(engine, encoding="utf-8")
                with running("gate", "--folder", str(folder), "--filters", filters, tree=tree) as (process, told):
                    found[name].append(_cost(process.pid, told, count, arguments.tokens))
        row = {"filters": filters, "concurrency": count, "microseconds_a_token": {}, "runs": found}
        row["microseconds_a_token"] = {name: statistics.median(costs) for name, costs in found.items()}
        print(row, flush=True)
        yield row


def _cost(process: int, told: str, count: int, tokens: int) -> float:
    """Microseconds a token, of streams that follow one that warms up."""
    url, secret = told.split()
    server, load = Server(f"{url}/v1", secret), Load(8, tokens)
    ask_from_here(server, load, count, count)
    requests = max(16, 2 * count)
    before = _processor_s(process)
    ask_from_here(server, load, requests, count)
    return 1e6 * (_processor_s(process) - before) / (requests * tokens)


def _processor_s(process: int) -> float:
    """Seconds of processor time of a process, by its clock; see clock_getcpuclockid(3) of Linux."""
    return time.clock_gettime((~process << 3) | 2)


def _machine() -> dict[str, Any]:
    from benchmarks.serving import _machine as machine

    return machine()


def _commit(tree: Path) -> str:
    asked = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
