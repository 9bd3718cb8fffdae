"""Deploys a base model and its tuned model, and lets go only when both answer as they did when they were scored."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from openai import OpenAI

from serving.app import OFFLINE_ENV, ServedModels, build_application, check_served
from serving.client import connect, exception_in, told_plainly
from serving.parity import Parity, Tolerance, check_parity
from training.errors import fail
from training.evaluation.scorecard import Probe

Probes = Mapping[Literal["base", "tuned"], Sequence[Probe]]

APPLICATION = "tenure"
# Float32 differs by the order of summation: on a CPU, at most 3.4e-5 and on average 6e-6 nats were measured with a
# model of 135 M parameters, against 0.3 on average for another adapter. Two bfloat16 kernels of one framework were
# already 0.28 and 0.04 apart.
TOLERANCES = {
    "float32": Tolerance(largest=2e-3, mean=2e-4),
    "bfloat16": Tolerance(largest=1.0, mean=0.1),
}
PORTS_TRIED = 100
# The caller is told through on_progress; the replicas keep their logs.
QUIET_ENV = {"VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint and how well it matches the scorecard."""

    base_url: str
    base_name: str
    tuned_name: str
    parity: Parity


@contextmanager
def deploy(
    served: ServedModels,
    probes: Probes,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_progress: Callable[[str], None],
) -> Iterator[Endpoint]:
    """An endpoint for as long as the context lasts; Ray must be initialised, and Serve not started on it.

    Raises:
        TenureError: the port is taken, Serve already runs, the engine does not start, or a served model disagrees
            with its probes.
    """
    check_port(host, port)
    check_served(served)
    os.environ.update(OFFLINE_ENV | QUIET_ENV)  # vLLM is imported in this process, too
    base_url = f"http://{host}:{port}/v1"
    with _serve(host, port, on_progress):
        _run(served, on_progress)
        with connect(base_url) as client:
            _wait(client, served, on_progress)
            parity = _compare(client, served, probes, on_progress)
        yield Endpoint(base_url, served.base_name, served.tuned_name, parity)


@contextmanager
def _serve(host: str, port: int, on_progress: Callable[[str], None]) -> Iterator[None]:
    """Ray Serve with one HTTP proxy, on the head node."""
    from ray import serve

    running = serve.status()
    if running.proxies or running.applications:
        what = "Ray Serve already runs on this cluster, where one endpoint at a time is supported"
        raise fail(what, "", "stop the other endpoint first (serve shutdown)")
    on_progress("starting Ray Serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        with _importing("serving.adapters"):
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        yield
    finally:
        serve.shutdown()


@contextmanager
def _importing(module: str) -> Iterator[None]:
    """Import a module beside the body: vLLM takes about 10 s, in which Serve's own processes start.

    Ray's LLM package takes over this process's root logger when imported; it is given back.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    imports = threading.Thread(target=import_module, args=(module,))
    imports.start()
    try:
        yield
    finally:
        imports.join()
        root.handlers = handlers
        root.setLevel(level)


def _run(served: ServedModels, on_progress: Callable[[str], None]) -> None:
    from ray import serve

    where = f"{served.gpus} GPU" if served.gpus else "CPU"
    on_progress(f"loading {served.base_name} and {served.tuned_name} into vLLM ({where}, {served.dtype})")
    application = build_application(served)
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        what = f"vLLM did not start: {_reason() or error}"
        raise fail(what, "", "see the replica's log in logs/serve of Ray's session folder") from error


def _reason() -> str:
    """The exception that each failed deployment reports."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application else ()
    failed = [found.message for found in deployments if found.status == "DEPLOY_FAILED"]
    return "; ".join(exception_in(message) for message in failed)


def _wait(client: OpenAI, served: ServedModels, on_progress: Callable[[str], None]) -> None:
    """One completion from each model: /v1/models answers before an engine does."""
    for name in (served.base_name, served.tuned_name):
        on_progress(f"waiting for the first token of {name}")
        with told_plainly(str(client.base_url)):
            client.completions.create(model=name, prompt="Hello", max_tokens=1)


def _compare(
    client: OpenAI,
    served: ServedModels,
    probes: Probes,
    on_progress: Callable[[str], None],
) -> Parity:
    on_progress("comparing both models with the scored artifact, token by token")
    tolerance = TOLERANCES[served.dtype]
    return Parity(
        base=check_parity(client, served.base_name, probes["base"], tolerance),
        tuned=check_parity(client, served.tuned_name, probes["tuned"], tolerance),
    )


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        TenureError: names the port, the reason and, when it is in use, a free one.
    """
    problem = _bind_problem(host, port)
    if problem is None:
        return
    if problem.errno == errno.EADDRINUSE:
        raise fail(f"port {port} on {host} is in use", "", _free_port(host, port))
    raise fail(f"cannot listen on {host}:{port} ({problem.strerror or problem})", "", "choose another host or port")


def _free_port(host: str, port: int) -> str:
    after = range(port + 1, min(port + PORTS_TRIED, 65536))
    free = next((other for other in after if _bind_problem(host, other) is None), None)
    return f"use --port {free}, which is free" if free else "stop what listens there, or use --port with a free one"


def _bind_problem(host: str, port: int) -> OSError | None:
    """Why a TCP socket cannot listen there; None when it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does: a closed port is free
        try:
            listener.bind((host, port))
        except OverflowError:
            return OSError(errno.EINVAL, "a port lies between 0 and 65535")
        except OSError as error:
            return error
    return None
