"""Configurations for Ray's cluster launcher (`ray up`): AWS, Google Cloud, and machines of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.manifests.settings import Settings
from training.errors import fail
from training.spec import Scaling

_HEAD = "head"
_WORKER = "workers"


def aws(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> dict[str, Any]:
    """EC2 machines; the workspace is an EFS, or another NFS, that the image mounts."""
    region, machine = _required(settings.region, "--region"), _required(settings.machine, "--machine")
    node = {"InstanceType": machine, "ImageId": settings.image}
    head = {"InstanceType": "m6i.xlarge", "ImageId": settings.image}
    provider = {"type": "aws", "region": region, "cache_stopped_nodes": False}
    return _cloud(run_id, provider, head, node, scaling, settings)


def gcp(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> dict[str, Any]:
    """Compute Engine machines; the workspace is a Filestore, or another NFS, that the image mounts."""
    region, machine = _required(settings.region, "--region"), _required(settings.machine, "--machine")
    provider = {
        "type": "gcp",
        "region": region,
        "availability_zone": f"{region}-a",
        "project_id": _required(settings.project, "--project"),
    }
    return _cloud(
        run_id, provider, _gcp_node("n2-standard-4", settings), _gcp_node(machine, settings), scaling, settings
    )


def _gcp_node(machine: str, settings: Settings) -> dict[str, Any]:
    disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT"}
    disk["initializeParams"] = {"diskSizeGb": 200, "sourceImage": settings.image}
    return {"machineType": machine, "disks": [disk]}


def onprem(command: str, spec: Path, run_id: str, scaling: Scaling, settings: Settings) -> dict[str, Any]:
    """Machines by address, the first of which is the head."""
    if len(settings.hosts) < 2:
        raise fail(f"{len(settings.hosts)} hosts are given", "--host", "give the head and then every worker, each once")
    head, *workers = settings.hosts
    return {
        **_common(run_id, settings, len(workers)),
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
    }


def _cloud(
    run_id: str,
    provider: dict[str, Any],
    head: dict[str, Any],
    node: dict[str, Any],
    scaling: Scaling,
    settings: Settings,
) -> dict[str, Any]:
    """A head without work of its own, and as many workers as the spec asks for."""
    count = settings.nodes(scaling)
    cpus, gpus = settings.per_node(scaling)
    return {
        **_common(run_id, settings, count),
        "provider": provider,
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"node_config": head, "resources": {"CPU": 0, "GPU": 0}, "min_workers": 0, "max_workers": 0},
            _WORKER: {
                "node_config": node,
                "resources": {"CPU": cpus, "GPU": gpus},
                "min_workers": count,
                "max_workers": count,
            },
        },
    }


def _common(run_id: str, settings: Settings, max_workers: int) -> dict[str, Any]:
    """What all have: a token that `ray up` carries to every node, and Ray started with it."""
    token = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token RAY_USAGE_STATS_ENABLED=0"
    start = "--object-manager-port=8076"
    return {
        "cluster_name": run_id.replace(".", "-").replace("_", "-"),
        "max_workers": max_workers,
        "auth": {"ssh_user": settings.ssh_user},
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "setup_commands": [f"test -d {settings.workspace} || {{ echo {settings.workspace} is not mounted; exit 1; }}"],
        "head_start_ray_commands": [
            "ray stop",
            f"{token}; ray start --head --port=6379 {start} --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{token}; ray start --address=$RAY_HEAD_IP:6379 {start}"],
    }


def _required(value: str | None, flag: str) -> str:
    if not value:
        raise fail("this is needed for the cloud's machines", flag, f"give {flag}; --image is the image they boot")
    return value
