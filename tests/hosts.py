"""Several hosts on one machine: network namespaces on a bridge, each with an address and processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).resolve().parents[1]
HEAD, CLIENT = "head", "client"
TOKEN = uuid.uuid4().hex
GCS_PORT, DASHBOARD_PORT = 6379, 8265
# Ray notices a dead node within seconds; by itself it takes half a minute.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def why_no_hosts() -> str | None:
    """Why this machine can make no network namespaces, or None."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"t{uuid.uuid4().hex[:6]}"
    made = _ip("netns", "add", name, check=False)
    _ip("netns", "del", name, check=False)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@dataclass
class Hosts:
    """Hosts by name, in the network 10.77.0.0/24; all see one disk, but for the folder where Ray keeps its session."""

    tag: str
    addresses: dict[str, str]
    scratch: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        return f"http://{self.addresses[HEAD]}:{DASHBOARD_PORT}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """Of every process on a host: tokens are asked for, and gloo is told which interface leads to the others."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TENURE_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        quiet = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        return {**kept, **_HEALTH, **given, **quiet, "PATH": path, "PYTHONPATH": str(ROOT)}

    def start(self, host: str, *command: str, token: str | None = TOKEN) -> subprocess.Popen[str]:
        """A process on a host."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.tag}{host}", *self._own_disk(host), *command],
            env=self.environment(token),
            cwd=self.scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def _own_disk(self, host: str) -> list[str]:
        """What runs a command with a folder of the host's own where Ray keeps its session."""
        own, seen = self.scratch / f"disk-{host}", self.scratch / "ray"
        for folder in (own, seen):
            folder.mkdir(exist_ok=True)
        return ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", str(own), str(seen)]

    def tenure(self, *arguments: str, token: str | None = TOKEN) -> subprocess.Popen[str]:
        """The command line on the host that is no part of the cluster."""
        return self.start(CLIENT, sys.executable, "-m", "cluster", *arguments, token=token)

    def start_ray(self, host: str, *arguments: str) -> None:
        """A Ray node of one CPU on a host."""
        address = self.addresses[host]
        common = ("--num-cpus=1", f"--node-ip-address={address}", f"--object-store-memory={80 * 2**20}")
        ray = str(Path(sys.executable).parent / "ray")
        started = self.start(host, ray, "start", *common, "--disable-usage-stats", *arguments)
        out, err = started.communicate(timeout=300)
        assert started.returncode == 0, out + err

    def pids(self, host: str) -> list[int]:
        """The processes on a host."""
        return [int(pid) for pid in _ip("netns", "pids", f"{self.tag}{host}", check=False).stdout.split()]

    def titles(self, host: str) -> list[str]:
        """What the processes on a host call themselves."""
        found = []
        for pid in self.pids(host):
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def cut(self, host: str) -> None:
        """Pull the plug of a host's network: packets are lost without a word."""
        _ip("link", "set", f"{self.tag}{host[:4]}", "down")

    def part(self, one: str, other: str) -> None:
        """Keep two hosts from each other, and from nobody else: packets are lost without a word."""
        for host, far in ((one, other), (other, one)):
            _ip("-n", f"{self.tag}{host}", "route", "add", "blackhole", f"{self.addresses[far]}/32")

    def join(self, one: str, other: str) -> None:
        """Undo part()."""
        for host, far in ((one, other), (other, one)):
            _ip("-n", f"{self.tag}{host}", "route", "del", "blackhole", f"{self.addresses[far]}/32")

    def alive(self) -> int:
        """How many Ray nodes the head counts."""
        script = "import sys, urllib.request as u; r = u.Request(sys.argv[1]); "
        script += "r.add_header('Authorization', sys.argv[2]); print(u.urlopen(r, timeout=5).read().decode())"
        asked = self.start(
            CLIENT, sys.executable, "-c", script, f"{self.dashboard}/nodes?view=summary", f"Bearer {TOKEN}"
        )
        out, _ = asked.communicate(timeout=30)
        if asked.returncode:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in json.loads(out)["data"]["summary"])

    def wait_for_nodes(self, count: int, wait_s: float = 180.0) -> None:
        deadline = time.monotonic() + wait_s
        while (alive := self.alive()) != count:
            assert time.monotonic() < deadline, f"{alive} nodes are alive, not {count}"
            time.sleep(1)


@contextmanager
def several_hosts(*workers: str) -> Iterator[Hosts]:
    """A head, the workers named and a client, in one network; gone afterwards with all their processes."""
    names = (HEAD, *workers, CLIENT)
    tag = f"tn{uuid.uuid4().hex[:4]}"
    addresses = {name: f"10.77.0.{index}" for index, name in enumerate(names, start=2)}
    hosts = Hosts(tag, addresses, Path(mkdtemp(prefix="tn", dir="/tmp")))
    try:
        _ip("link", "add", f"{tag}br", "type", "bridge")
        _ip("link", "set", f"{tag}br", "up")
        for name in names:
            _join(hosts, name)
        yield hosts
    finally:
        _tear_down(hosts)


def _join(hosts: Hosts, name: str) -> None:
    space, port = f"{hosts.tag}{name}", f"{hosts.tag}{name[:4]}"
    _ip("netns", "add", space)
    _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", port, "master", f"{hosts.tag}br", "up")
    _ip("-n", space, "addr", "add", f"{hosts.addresses[name]}/24", "dev", "eth0")
    _ip("-n", space, "link", "set", "eth0", "up")
    _ip("-n", space, "link", "set", "lo", "up")


def _tear_down(hosts: Hosts) -> None:
    for name in hosts.addresses:
        for pid in hosts.pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ip("netns", "del", f"{hosts.tag}{name}", check=False)
        _ip("link", "del", f"{hosts.tag}{name[:4]}", check=False)
    _ip("link", "del", f"{hosts.tag}br", check=False)
    for process in hosts.processes:
        process.kill()
        process.communicate()
    shutil.rmtree(hosts.scratch, ignore_errors=True)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
