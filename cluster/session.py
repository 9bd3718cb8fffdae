"""Connects to a Ray cluster, or starts a local one that ends with the command."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import Problem, TenureError, fail
from training.faults import output_to
from training.quiet import QUIET
from training.spec import Scaling

_CONNECT_S = 5.0
# What ray.init() raises; besides, a bare Exception where its processes do not come up in time.
_REFUSALS = (ConnectionError, RuntimeError, ValueError)
_OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def ray_session(
    address: str | None, resources: dict[str, float], log: Path, meanwhile: Sequence[str] = ()
) -> Iterator[None]:
    """Ray, with at least these resources in all, for the length of the body.

    Args:
        address: host:port or ray://host:port of a head; None starts a local instance, dashboard off.
        log: where Ray's own words at the start go.
        meanwhile: modules that the body needs, imported while Ray's processes come up.

    Raises:
        TenureError: the head does not answer, or the cluster is smaller than asked for.
    """
    import ray

    if address is not None:
        check_address(address)
    if ray.is_initialized():
        _check_resources(ray.cluster_resources(), resources)
        yield
        return
    try:
        with output_to(log), imported(meanwhile):
            _connect(address, resources)
        _check_resources(ray.cluster_resources(), resources)
        yield
    finally:
        with output_to(Path(os.devnull)):  # the workspace's disk may be full by now
            ray.shutdown()


@contextmanager
def imported(modules: Sequence[str]) -> Iterator[None]:
    """Modules imported beside the body, which waits for other processes, and done when it ends."""
    thread = threading.Thread(target=lambda: list(map(importlib.import_module, modules)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def needs(scaling: Scaling) -> dict[str, float]:
    """What a whole run claims of the cluster; of an elastic one, what it cannot do without."""
    workers = scaling.min_workers or scaling.workers
    wanted = {"CPU": float(workers * scaling.cpus_per_worker)}
    gpus = float(workers * scaling.gpus_per_worker)
    return {**wanted, "GPU": gpus} if gpus else wanted


def _connect(address: str | None, resources: dict[str, float]) -> None:
    import ray

    where = {"address": address} if address is not None else _local(resources)
    environment = {"env_vars": {**QUIET, **_python_path()}}
    try:
        ray.init(**where, runtime_env=environment, log_to_driver=False, logging_level="error")
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _REFUSALS):
            raise
        instead = "check address, token and Ray version" if address else "try again; the machine may be overloaded"
        raise fail(f"could not connect: {_first_line(error)}", address or "a local Ray", instead) from error


def check_address(address: str) -> None:
    """Refuse an address that nobody answers at, within five seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise fail(f"'{address}' is no address", "--address", "give host:port of the head, or ray://host:port")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return
    except OSError as error:
        reason = error.strerror or str(error)
        what = f"no Ray head answers at {address}: {reason}"
        raise fail(what, "--address", "start one with: ray start --head, or leave --address out") from None


def _local(resources: dict[str, float]) -> dict[str, Any]:
    """A Ray of our own, as large as the machine, and large enough for what is asked (processors may be shared).

    Said to be local, or Ray would join one that happens to run here.
    """
    cpus = max(os.cpu_count() or 1, int(resources.get("CPU", 1)))
    size = {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}
    return {"address": "local", "include_dashboard": False, **size}


def _python_path() -> dict[str, str]:
    """Workers import the package from where this process did, installed or not."""
    here = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{here}:{given}" if given else here}


def _check_resources(have: dict[str, float], want: dict[str, float]) -> None:
    short = [
        Problem(f"the run wants {amount:g} {name}, the cluster has {have.get(name, 0):g}", "scaling", _SMALLER[name])
        for name, amount in want.items()
        if have.get(name, 0) < amount
    ]
    if short:
        raise TenureError(short)


_SMALLER = {
    "GPU": "lower scaling.workers, set gpus_per_worker: 0 to train on processors, or join more nodes",
    "CPU": "lower scaling.workers or cpus_per_worker, or join more nodes",
}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
