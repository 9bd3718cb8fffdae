"""What the doctor runs on every node, as a Ray actor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

from cluster.doctor import NodeFacts, authentication_mode

_PACKAGES = ("ray", "torch", "deepspeed", "transformers", "peft")
_MIB = 32
_ROUNDS = 4
_CONNECT_S = 3.0
_PATIENCE = timedelta(seconds=30)


class Probe:
    """A node's answers; `host` is its address."""

    def __init__(self, host: str) -> None:
        self.host = host

    def now(self) -> float:
        """Seconds since 1970, by this node's clock."""
        return time.time()

    def facts(self, marker: str, mark: str) -> NodeFacts:
        """Everything that this node knows of itself alone."""
        return NodeFacts(
            host=self.host,
            versions={"python": platform.python_version(), **_installed()},
            gpus=_gpu_names(),
            driver=_driver(),
            shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
            disk_free_bytes=shutil.disk_usage(os.environ.get("RAY_TMPDIR", "/tmp")).free,
            clock_offset_s=0.0,
            authentication=authentication_mode(),
            workspace=self._why_not_shared(Path(marker), mark),
        )

    def _why_not_shared(self, marker: Path, mark: str) -> str | None:
        """Read what the driver wrote, and write an answer beside it."""
        try:
            if marker.read_text(encoding="utf-8") != mark:
                return "another folder is mounted there"
            Path(f"{marker}-{self.host}").write_text(mark, encoding="utf-8")
        except OSError as error:
            return f"{error.strerror or error}: {marker.parent}"
        return None

    def address(self) -> str:
        """A place where the other side of an exchange finds this node."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{self.host}:{free.getsockname()[1]}"

    def listen(self) -> int:
        """A port that the system chose, at which this node accepts connections as long as the probe is there."""
        self._listener = socket.socket()
        self._listener.bind((self.host, 0))
        self._listener.listen()
        return int(self._listener.getsockname()[1])

    def unreached(self, host: str, ports: list[int]) -> list[int]:
        """Those of another node's ports that do not accept a connection within three seconds."""
        return [port for port in ports if not _accepts(host, port)]

    def exchange(self, rank: int, where: str, backend: str) -> float:
        """Bytes a second of a broadcast, by gloo or NCCL, from the first of two nodes to the second."""
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(_MIB * 2**18, device="cuda" if backend == "nccl" else "cpu")
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=2, timeout=_PATIENCE)
        try:
            dist.broadcast(tensor, 0)
            dist.barrier()
            started = time.monotonic()
            for _ in range(_ROUNDS):
                dist.broadcast(tensor, 0)
            dist.barrier()
            if backend == "nccl":
                torch.cuda.synchronize()
            return _ROUNDS * _MIB * 2**20 / (time.monotonic() - started)
        finally:
            dist.destroy_process_group()


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _gpu_names() -> tuple[str, ...]:
    return tuple(_smi("name"))


def _driver() -> str | None:
    return next(iter(_smi("driver_version")), None)


def _smi(field: str) -> list[str]:
    """A line a GPU of what the driver tells; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
