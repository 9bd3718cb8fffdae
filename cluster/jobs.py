"""Submits runs to a Ray cluster through its Job API, and follows them; the machine that submits is no node of it.

A job's submission id is its run's id. What is done under an id is done once, however often it is submitted.
"""

from __future__ import annotations

import logging
import re
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.machines import Node, nodes_of
from cluster.packing import Packed, pack
from training.errors import TenureError, fail

Command = Literal["train", "sweep", "sequence", "eval", "serve"]
RAY_VERSIONS = ((2, 58), (2, 60))
_DASHBOARD_PORT = 8265
_CONNECT_S = 5.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_STATUSES = {3: "done; the contract is broken", 4: "done; too few items decide the contract"}


@dataclass(frozen=True)
class Job:
    """A job as its cluster tells of it; times in seconds since 1970."""

    id: str
    state: str
    command: str
    workspace: str
    message: str
    started_s: float | None
    ended_s: float | None
    exit_status: int | None
    waits: str = ""
    """For what, if it waits."""

    @property
    def told(self) -> str:
        """How it stands, in words."""
        return self.waits or _STATUSES.get(self.exit_status or 0, self.state.lower())


def submit(
    command: Command,
    subject: str | Path,
    *,
    address: str,
    workspace: str,
    run_id: str | None = None,
    of: str | None = None,
) -> tuple[str, Packed]:
    """Submit a spec (or, to serve, a run) to a cluster; the run's id, and what was packed.

    Args:
        address: the head's dashboard, http://HOST:8265. Where the cluster asks for a token, Ray reads it from
            RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, with RAY_AUTH_MODE=token.
        workspace: an absolute path that every node of the cluster sees.
        run_id: its name; by default made of the spec's name and the time. A sweep's is its name.
        of: what `eval` scores: a run of that workspace, or the absolute path of an artifact that every node sees.

    Raises:
        TenureError: the spec is not valid, a file is too large, the cluster does not answer or refuses, or is smaller
            than the spec asks for, or the id is taken.
    """
    if not PurePosixPath(workspace).is_absolute():
        raise fail(f"'{workspace}' is no absolute path", "--workspace", "name a folder that every node sees")
    check_scored(command, of)
    spec = None if command == "serve" else Path(subject)
    name, wants = _read(command, spec) if spec else (f"serve-{subject}", {})
    chosen = run_id or (name if command == "sweep" else f"{name}-{time.strftime('%y%m%d-%H%M%S')}")
    _check_id(chosen, name if command == "sweep" else None)
    client = connect(address)
    _check_room(client, wants)
    with tempfile.TemporaryDirectory(prefix="tenure-") as scratch:
        packed = pack(command, str(subject), chosen, spec, Path(scratch), of)
        _send(client, chosen, workspace, {"working_dir": scratch}, {"command": command, "workspace": workspace})
    return chosen, packed


def resume(run_id: str, *, address: str, workspace: str | None = None) -> None:
    """Go on with a run that was submitted, on this cluster or on a new one that sees the same workspace.

    Args:
        workspace: needed where the cluster does not know the job.

    Raises:
        TenureError: it is still running, or the cluster knows no such job and no workspace is given.
    """
    client = connect(address)
    known = {job.id: job for job in _list(client)}
    job = known.get(run_id)
    if job and job.state not in _ENDED:
        raise fail(f"job '{run_id}' is {job.state.lower()}", address, f"stop it first: tenure stop {run_id}")
    place = workspace or (job.workspace if job else None)
    if not place:
        raise fail(f"the cluster knows no job '{run_id}'", address, "say where it was kept: tenure --workspace PATH")
    if job:
        client.delete_job(run_id)
    kept = f"{place}/jobs/{run_id}"
    metadata = {"command": job.command if job else "resume", "workspace": place}
    _send(client, run_id, place, {}, metadata, prefix=f"PYTHONPATH={shlex.quote(kept)} ")


def list_jobs(address: str) -> list[Job]:
    """All jobs that Tenure submitted to a cluster, the newest first."""
    client = connect(address)
    jobs = [_with_wait(client, job) for job in _list(client) if job.command]
    return sorted(jobs, key=lambda job: job.started_s or 0.0, reverse=True)


def job_of(run_id: str, address: str) -> Job:
    """How one job stands.

    Raises:
        TenureError: the cluster knows none of that id.
    """
    client = connect(address)
    return _with_wait(client, _known(client, run_id, address))


def _with_wait(client: Any, job: Job) -> Job:
    """The job, with what it waits for: what it says last, while it runs."""
    from training.waiting import wait_in

    if job.state != "RUNNING":
        return job
    with _answers(client):
        return replace(job, waits=wait_in(str(client.get_job_logs(job.id))))


def logs_of(run_id: str, address: str) -> str:
    """What a job has written so far."""
    client = connect(address)
    _known(client, run_id, address)
    return str(client.get_job_logs(run_id))


def follow(run_id: str, address: str, tell: Callable[[str], None]) -> Job:
    """Tell what a job writes, as it writes it, until it ends; how it stands then."""
    import asyncio

    client = connect(address)
    _known(client, run_id, address)
    asyncio.run(_tell_all(client.tail_job_logs(run_id), tell))
    while (job := _known(client, run_id, address)).state not in _ENDED:
        time.sleep(1)
    return job


async def _tell_all(lines: AsyncIterator[str], tell: Callable[[str], None]) -> None:
    async for text in lines:
        tell(text)


def stop(run_id: str, address: str) -> Job:
    """Stop a job, which keeps its checkpoints; how it stands then."""
    client = connect(address)
    if _known(client, run_id, address).state not in _ENDED:
        client.stop_job(run_id)
    while (job := _known(client, run_id, address)).state not in _ENDED:
        time.sleep(0.5)
    return job


def nodes_at(address: str) -> list[Node]:
    """The nodes of a cluster, by its dashboard."""
    client = connect(address)
    with _answers(client):
        reply = client._do_request("GET", "/nodes?view=summary")
        reply.raise_for_status()
        return nodes_of(reply.json()["data"]["summary"])


def connect(address: str) -> Any:
    """A client of a cluster's Job API.

    Raises:
        TenureError: nobody answers, the token is not the cluster's, or its Ray is of another version.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    url = _url(address)
    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of uploads and of sockets closed
    try:
        client = JobSubmissionClient(url)
    except AuthenticationError as error:
        told = (
            "the cluster does not take this token" if "invalid" in str(error).lower() else "the cluster wants a token"
        )
        raise fail(told, url, "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to that of the head") from None
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        what = f"no Ray dashboard answers there: {str(error).splitlines()[0][:200]}"
        raise fail(what, url, f"give the head's dashboard, as http://HOST:{_DASHBOARD_PORT}") from None
    check_version(str(getattr(client, "_server_ray_version", None) or ""), url)
    return client


def check_version(version: str, where: str) -> None:
    """Refuse a cluster whose Ray this release does not run on."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not RAY_VERSIONS[0] <= found <= RAY_VERSIONS[1]:
        raise fail(f"the cluster runs Ray {version or 'of no known version'}", where, "use Ray 2.58 to 2.60 there")


def _url(address: str) -> str:
    """The address as a URL that somebody listens at."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else _DASHBOARD_PORT)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        instead = f"jobs go to the head's dashboard: http://HOST:{_DASHBOARD_PORT}"
        raise fail(f"'{address}' is no address of a dashboard", "--address", instead)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except OSError as error:
        what = f"nobody answers at {parts.hostname}:{port}: {error.strerror or error}"
        raise fail(what, "--address", f"check the head, and that port {port} is open from here") from None
    return f"{parts.scheme}://{parts.hostname}:{port}{parts.path}"


def check_scored(command: Command, of: str | None) -> None:
    """Refuse an evaluation of nothing, of what other nodes do not see, and other commands that name an artifact."""
    if command != "eval":
        if of:
            raise fail(f"{command} scores no artifact that is there", "--of", "leave it out, or: tenure submit eval")
        return
    if not of:
        raise fail("an evaluation scores an artifact", "--of", "name a run of that workspace, or an artifact's folder")
    if "/" in of and not PurePosixPath(of).is_absolute():
        raise fail(f"'{of}' is no absolute path", "--of", "put the artifact where every node sees it")


def _read(command: Command, spec: Path) -> tuple[str, dict[str, float]]:
    """The name in a spec, valid but for its files, and what it claims of the cluster."""
    from cluster.session import needs
    from sweeps.loading import load_sweep
    from training.sequences.steps import load_sequence
    from training.specfile import load_spec

    if command == "sweep":
        sweep, _ = load_sweep(spec, look_at_files=False)
        return sweep.title, needs(sweep.run.scaling)
    read = load_sequence(spec, look_at_files=False) if command == "sequence" else load_spec(spec, look_at_files=False)
    scaling = read.scaling.model_copy(update={"workers": 1, "min_workers": None}) if command == "eval" else read.scaling
    return read.name, needs(scaling)


def _check_id(run_id: str, title: str | None) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", run_id):
        raise fail(f"'{run_id}' is no id", "--id", "use lower-case letters, digits, '.', '_' and '-'")
    if title and run_id != title:
        raise fail("a sweep's id is its name", "--id", f"leave it out, or set name: {run_id} in the spec")


def _check_room(client: Any, wants: dict[str, float]) -> None:
    """Refuse what is larger than the cluster, unless that grows by itself or does not tell its size."""
    have, grows = _size(client)
    short = {name: amount for name, amount in wants.items() if have and have.get(name, 0.0) < amount}
    if short and not grows:
        told = ", ".join(f"{amount:g} {name} of {have.get(name, 0.0):g}" for name, amount in short.items())
        raise fail(
            f"the spec wants more than the cluster has: {told}", "scaling", "lower scaling.workers, or add nodes"
        )


def _size(client: Any) -> tuple[dict[str, float], bool]:
    """What the cluster has of each resource, by its autoscaler's report, and whether nodes can still be launched."""
    reply = client._do_request("GET", "/api/cluster_status")
    status = (reply.json().get("data") or {}).get("clusterStatus") or {} if reply.status_code == 200 else {}
    usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
    kinds = (status.get("autoscalerReport") or {}).get("availableNodeTypes") or {}
    return {name: float(amounts[1]) for name, amounts in usage.items()}, bool(kinds)


def _send(
    client: Any, run_id: str, workspace: str, environment: dict[str, Any], metadata: dict[str, str], prefix: str = ""
) -> None:
    entry = f"{prefix}python -m cluster.entry {shlex.quote(workspace)} {shlex.quote(run_id)}"
    with _answers(client):
        if any(job.id == run_id for job in _list(client)):
            instead = f"give another --id, or go on with it: tenure resume {run_id} --address ..."
            raise fail(f"the id '{run_id}' is taken", "--id", instead)
        client.submit_job(entrypoint=entry, submission_id=run_id, runtime_env=environment, metadata=metadata)


@contextmanager
def _answers(client: Any) -> Iterator[None]:
    """A refusal of the cluster as one error."""
    try:
        yield
    except TenureError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        what = f"the cluster refused: {str(error).strip().splitlines()[-1][:300]}"
        raise fail(what, client.get_address(), "see the head's dashboard") from None


def _known(client: Any, run_id: str, address: str) -> Job:
    found = next((job for job in _list(client) if job.id == run_id), None)
    if found is None:
        raise fail(f"the cluster knows no job '{run_id}'", address, "tenure jobs lists those that it knows")
    return found


def _list(client: Any) -> list[Job]:
    with _answers(client):
        return [_job(details) for details in client.list_jobs() if details.submission_id]


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        state=str(details.status.value),
        command=metadata.get("command", ""),
        workspace=metadata.get("workspace", ""),
        message=(details.message or "").strip(),
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        exit_status=details.driver_exit_code,
    )
