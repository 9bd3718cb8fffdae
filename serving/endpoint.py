"""Deploys models, and lets go only when they answer as they did when they were scored."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from openai import OpenAI

from serving.access import Doorkeeper
from serving.app import OFFLINE_ENV, ServedModels, build_application, check_fleet
from serving.catalog import CatalogFile
from serving.client import connect, exception_in, told_plainly
from serving.files import ServingFolder
from serving.fleet import Fleet
from serving.keys import KeyStore
from serving.listening import Listen
from serving.parity import Difference, Tolerance, check_parity
from serving.spec import LOOPBACK, Access, Tls
from training.errors import fail
from training.evaluation.scorecard import Probe

Probes = Mapping[Literal["base", "tuned"], Sequence[Probe]]

APPLICATION = "tenure"
OWN_KEY_S = 365 * 86_400.0
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
    """A running endpoint and how well it matches the scorecards: by model's name, the difference of each compared."""

    base_url: str
    names: tuple[str, ...]
    parity: Mapping[str, Difference]
    open: bool
    """Whether models answer without a key."""


@contextmanager
def deploy(
    served: ServedModels,
    probes: Probes,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    folder: Path | None = None,
    on_progress: Callable[[str], None],
) -> Iterator[Endpoint]:
    """An endpoint for one tuned model and its base; see deploy_fleet. Without a `folder` it gets a temporary one."""
    by_name = {served.base_name: probes.get("base", ()), served.tuned_name: probes.get("tuned", ())}
    with folder_or_temporary(folder) as path:
        access = Access(folder=path, host=host)
        with deploy_fleet(served.fleet, by_name, access, port=port, on_progress=on_progress) as endpoint:
            yield endpoint


@contextmanager
def folder_or_temporary(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that lasts as long as the body."""
    if folder is not None:
        yield folder
        return
    with TemporaryDirectory(prefix="tenure-serving-") as made:
        yield Path(made)


@contextmanager
def deploy_fleet(
    fleet: Fleet,
    probes: Mapping[str, Sequence[Probe]],
    access: Access,
    *,
    port: int = 8000,
    tls: Tls | None = None,
    on_progress: Callable[[str], None],
) -> Iterator[Endpoint]:
    """An endpoint for as long as the context lasts; Ray must be initialised, and Serve not started on it.

    Args:
        probes: what each model was scored with; a name without any is not compared.

    Raises:
        TenureError: the port is taken, Serve already runs, no key opens an endpoint that others can reach, the engine
            does not start, or a served model disagrees with its probes.
    """
    check_port(access.host, port)
    check_fleet(fleet)
    keys = KeyStore(ServingFolder(access.folder).keys)
    check_keys(access, keys)
    os.environ.update(OFFLINE_ENV | QUIET_ENV)  # vLLM is imported in this process, too
    CatalogFile(ServingFolder(access.folder).catalog).write(fleet.catalog())
    base_url = f"{'https' if tls else 'http'}://{_name_of(access.host)}:{port}/v1"
    with _own_key(access, keys, base_url, tls) as secret, _serve(on_progress):
        _run(fleet, access, _listen_at(access.host, port, tls), on_progress)
        with connect(base_url, secret=secret, certificate=tls.certificate if tls else None) as client:
            _wait(client, fleet, on_progress)
            on_progress("comparing the models with the scored artifacts, token by token")
            parity = {
                name: check_parity(client, name, found, TOLERANCES[fleet.dtype]) for name, found in probes.items()
            }
        yield Endpoint(base_url, tuple(fleet.catalog().names), parity, Doorkeeper(access, keys).open)


def check_keys(access: Access, keys: KeyStore) -> None:
    """Refuse an endpoint that nobody could use, or everybody.

    Raises:
        TenureError: keys are required, and there is none.
    """
    if (access.keys == "required" or access.host not in LOOPBACK) and not keys.any_active("models"):
        what = f"an endpoint on {access.host} needs API keys, and there is none"
        raise fail(what, str(ServingFolder(access.folder).keys), "make one: tenure keys create NAME")


def _name_of(host: str) -> str:
    """How this machine reaches itself where an endpoint listens on every interface."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


@contextmanager
def _own_key(access: Access, keys: KeyStore, base_url: str, tls: Tls | None) -> Iterator[str]:
    """A key of administration for as long as the endpoint lasts, in a file that this machine's user alone may read."""
    key, secret = keys.create("the endpoint's own", ("admin",), lasts_s=OWN_KEY_S)
    file = ServingFolder(access.folder).endpoint
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as written:
        certificate = str(tls.certificate) if tls else None
        json.dump({"url": base_url, "key": secret, "pid": os.getpid(), "certificate": certificate}, written)
    try:
        yield secret
    finally:
        keys.revoke(key.id)
        file.unlink(missing_ok=True)


@contextmanager
def _serve(on_progress: Callable[[str], None]) -> Iterator[None]:
    """Ray Serve without a proxy: the endpoint listens by itself."""
    from ray import serve

    running = serve.status()
    if running.proxies or running.applications:
        what = "Ray Serve already runs on this cluster, where one endpoint at a time is supported"
        raise fail(what, "", "stop the other endpoint first (serve shutdown)")
    on_progress("starting Ray Serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        with _importing("serving.adapters"):
            _start()
        yield
    finally:
        serve.shutdown()


def _start() -> None:
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.start(proxy_location="Disabled")
    except (RayError, TimeoutError) as error:
        what = f"Ray Serve did not start: {str(error).splitlines()[0]}"
        raise fail(what, "", "try again when the machine has less to do, or see logs/serve of Ray's session") from error


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


def _listen_at(host: str, port: int, tls: Tls | None) -> Listen:
    return Listen(host, port, tls.certificate, tls.key) if tls else Listen(host, port)


def _run(fleet: Fleet, access: Access, listen_at: Listen, on_progress: Callable[[str], None]) -> None:
    from ray import serve

    where = f"{fleet.gpus} GPU" if fleet.gpus else "CPU"
    on_progress(f"loading {', '.join(engine.name for engine in fleet.engines)} into vLLM ({where}, {fleet.dtype})")
    application = build_application(fleet, access, listen_at)
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


def _wait(client: OpenAI, fleet: Fleet, on_progress: Callable[[str], None]) -> None:
    """One completion from each engine, and its first adapter: /v1/models answers before an engine does."""
    for engine in fleet.engines:
        for name in (engine.name, *list(engine.adapters)[:1]):
            on_progress(f"waiting for the first token of {name}")
            with told_plainly(str(client.base_url)):
                client.completions.create(model=name, prompt="Hello", max_tokens=1)


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
