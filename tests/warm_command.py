"""A process that has imported what commands need and forks one `tenure` after the other: imports are paid once.

Every command is still a process of its own, with the environment and the folder it is given. The process reads one JSON
object a line, {"arguments", "folder", "environment", "out", "err"}, and answers with the exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

# Imported lazily by most commands; none of them starts a thread before it is used.
MODULES = (
    "cluster.cli",
    "cluster.pipeline",
    "cluster.checking",
    "cluster.screen",
    "datasets",
    "lm_eval.tasks",
    "mlflow",
    "peft",
    "ray",
    "torch",
    "training.stages",
    "training.worker",
    "transformers.models.auto.modeling_auto",
)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def _run(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """The command, in this forked process, which ends with it."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = ["tenure", *arguments]
    os._exit(_status())


def _status() -> int:
    from cluster.cli import main

    status: Any = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status)


if __name__ == "__main__":
    serve()
