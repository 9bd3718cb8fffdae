"""RayJob, RayService and RayCluster for KubeRay, with Kueue's labels, a shared volume, GPU limits and a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.settings import Settings
from cluster.packing import JOB_FILE, references
from training.errors import fail
from training.quiet import QUIET
from training.spec import Scaling

Manifest = dict[str, Any]
RAY_VERSION = "2.60.0"
_JOB_FOLDER = "/etc/tenure/job"
_CONFIG_BYTES = 900 * 2**10  # a ConfigMap takes one MiB
_RETRIES = 3


def rayjob(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> list[Manifest]:
    """A run that brings its cluster and takes it down again; a cluster that dies is made anew, and the run goes on.

    Raises:
        TenureError: the spec's own files are too large for a ConfigMap.
    """
    config = _config_map(command, spec, run_id, settings)
    entry = f"cd {_JOB_FOLDER} && python -m cluster.entry {settings.workspace} {run_id} --verdicts-succeed"
    job: Manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(run_id, settings),
        "spec": {
            "entrypoint": f"bash -c '{entry}'",
            "jobId": run_id,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "backoffLimit": _RETRIES,
            "rayClusterSpec": _cluster(scaling, settings, _job_volume(config["metadata"]["name"], config["data"])),
        },
    }
    if settings.queue:
        job["spec"]["suspend"] = True  # Kueue lets it go when there is room
    return [config, job]


def raycluster(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> list[Manifest]:
    """A cluster that stays, for runs to be submitted to."""
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _metadata(run_id, settings)}
    return [{**cluster, "spec": _cluster(scaling, settings)}]


def rayservice(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> list[Manifest]:
    """The endpoint of a scored run, which Kubernetes keeps up. `run_id` is the run's."""
    serving = {
        "applications": [
            {
                "name": "tenure",
                "route_prefix": "/",
                "import_path": "cluster.served:application",
                "args": {"workspace": settings.workspace, "run": run_id},
            }
        ]
    }
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": _metadata(f"{run_id}-serve", settings)}
    config = yaml.safe_dump(serving, sort_keys=False)
    return [{**service, "spec": {"serveConfigV2": config, "rayClusterConfig": _cluster(scaling, settings)}}]


def _metadata(name: str, settings: Settings) -> Manifest:
    kubernetes_name = name.replace("_", "-").replace(".", "-")
    if len(kubernetes_name) > 47:
        raise fail(
            f"'{kubernetes_name}' is longer than the 47 letters that KubeRay takes", "--id", "give a shorter one"
        )
    labels = {"app.kubernetes.io/part-of": "tenure"}
    labels |= {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    labels |= {"kueue.x-k8s.io/priority-class": settings.priority} if settings.priority else {}
    return {"name": kubernetes_name, "namespace": settings.namespace, "labels": labels}


def _config_map(command: str, spec: Path, run_id: str, settings: Settings) -> Manifest:
    """The spec and the small files beside it, keyed by numbers, since keys hold no slashes."""
    files, _ = references(spec)
    folder = spec.resolve().parent
    far = [file for file in files if not file.is_relative_to(folder)]
    total = sum(file.stat().st_size for file in files)
    if far or total > _CONFIG_BYTES:
        what = f"{far[0]} lies outside the spec's folder" if far else f"the spec's files take {total / 2**20:.1f} MiB"
        raise fail(f"{what}, and a manifest holds none such", str(spec), "name data by absolute paths or URLs")
    job = {"id": run_id, "command": command, "subject": f"files/{spec.name}"}
    data = {JOB_FILE: json.dumps(job)}
    for file in files:
        data[_key(str(file.relative_to(folder)))] = file.read_text(encoding="utf-8")
    metadata = _metadata(run_id, settings)
    metadata = {**metadata, "name": f"{metadata['name']}-job"[:63]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _key(path: str) -> str:
    return "files__" + path.replace("/", "__")


def _job_volume(name: str, data: dict[str, str]) -> Manifest:
    items = [{"key": key, "path": key.replace("__", "/") if key != JOB_FILE else key} for key in data]
    return {"name": "job", "configMap": {"name": name, "items": items}}


def _cluster(scaling: Scaling, settings: Settings, job: Manifest | None = None) -> Manifest:
    cpus, gpus = settings.per_node(scaling)
    nodes = settings.nodes(scaling)
    cluster: Manifest = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # No worker and no scoring on the head, which the cluster dies with.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            "template": _pod("ray-head", {"cpu": "2", "memory": "8Gi"}, settings, job),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": nodes,
                "minReplicas": nodes,
                "maxReplicas": nodes,
                "rayStartParams": {"num-cpus": str(cpus)},
                "template": _pod("ray-worker", _resources(cpus, gpus, settings), settings, None),
            }
        ],
    }
    if settings.redis:
        cluster["gcsFaultToleranceOptions"] = {"redisAddress": settings.redis}
    return cluster


def _resources(cpus: int, gpus: int, settings: Settings) -> dict[str, str]:
    return {"cpu": str(cpus), "memory": settings.memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}


def _pod(container: str, amounts: dict[str, str], settings: Settings, job: Manifest | None) -> Manifest:
    """A pod whose requests are its limits, so that it is the last that a node short of memory evicts."""
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if settings.claim:
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": settings.claim}})
        mounts.append({"name": "workspace", "mountPath": settings.workspace})
    if job:
        volumes.append(job)
        mounts.append({"name": "job", "mountPath": _JOB_FOLDER})
    made: Manifest = {
        "name": container,
        "image": settings.image,
        "env": [{"name": name, "value": value} for name, value in QUIET.items()],
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": mounts,
    }
    if settings.env_secret:
        made["envFrom"] = [{"secretRef": {"name": settings.env_secret}}]
    return {"spec": {"containers": [made], "volumes": volumes}}
