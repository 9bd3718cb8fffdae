"""The commands about the cluster itself: `tenure cluster doctor` and `tenure cluster manifest`."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.job_commands import given_workspace


@click.group("cluster")
def cluster_group() -> None:
    """What is wrong with a cluster, and files that start one."""


@cluster_group.command("doctor")
@click.option("--address", help="A Ray head, host:port, from one of its nodes. Default: a local Ray.")
@click.pass_context
def doctor(context: click.Context, address: str | None) -> None:
    """Examine every node: versions, GPUs, network, storage, clocks, disks. Exit status 1: something is wrong."""
    from cluster.doctor import GIB, examine
    from cluster.screen import make_screen, print_error, table
    from cluster.session import ray_session
    from training.errors import TenureError

    root = context.obj.root
    root.mkdir(parents=True, exist_ok=True)
    console = make_screen()
    with ray_session(address, {}, root / "ray.log"):
        found = examine(root)
    columns = ("node", "python", "ray", "torch", "GPUs", "shm GiB", "disk GiB", "clock s", "token", "workspace")
    rows = [
        (
            node.host,
            *(node.versions[name] for name in ("python", "ray", "torch")),
            ", ".join(node.gpus) or "none",
            f"{node.shm_bytes / GIB:.0f}",
            f"{node.disk_free_bytes / GIB:.0f}",
            f"{node.clock_offset_s:+.2f}",
            "yes" if node.authentication == "token" else "no",
            "shared" if node.workspace is None else "not shared",
        )
        for node in found.nodes
    ]
    console.print(table(columns, rows))
    for link in found.links:
        told = "nothing" if link.bytes_s is None else f"{link.bytes_s / 1e9:.2f} GB/s"
        console.print(f"{link.source} to {link.target} by {link.by}: {told}")
    if found.problems:
        print_error(TenureError(found.problems))
        raise SystemExit(1)
    console.print("nothing is wrong")


@cluster_group.command("manifest")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--for", "kind", required=True, help="rayjob, rayservice, raycluster, slurm, aws, gcp or onprem.")
@click.option("--id", "run_id", help="The run's id; for rayservice the run to serve. Default: the spec's name.")
@click.option("--image", default="tenure:latest", show_default=True, help="With Tenure in it; of a cloud's machines.")
@click.option("--namespace", default="default", show_default=True)
@click.option("--claim", help="Kubernetes: the ReadWriteMany volume claim that is mounted as the workspace.")
@click.option("--queue", help="Kubernetes: Kueue's local queue.")
@click.option("--priority", help="Kubernetes: Kueue's priority class.")
@click.option("--env-secret", help="Kubernetes: a secret whose keys become environment variables, for object stores.")
@click.option("--redis", help="Kubernetes: HOST:PORT of a Redis that keeps the head's state.")
@click.option("--memory", default="32Gi", show_default=True, help="Of a node.")
@click.option("--workers-per-node", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--hours", default=24, show_default=True, type=click.IntRange(min=1), help="Slurm: the time limit.")
@click.option("--partition", help="Slurm: the partition.")
@click.option("--host", "hosts", multiple=True, help="onprem: a machine's address, the head first; again for more.")
@click.option("--region", help="aws, gcp: where.")
@click.option("--machine", help="aws, gcp: the kind of a worker's machine.")
@click.option("--project", help="gcp: the project.")
@click.option("--ssh-user", default="ubuntu", show_default=True, help="aws, gcp, onprem.")
@click.option("--out", type=click.Path(path_type=Path), help="A file, instead of standard output.")
@click.pass_context
def manifest(
    context: click.Context, /, spec: Path, kind: str, run_id: str | None, out: Path | None, **settings: object
) -> None:
    """Write what starts SPEC on a cluster of its own. --workspace is a folder there that every node sees."""
    from cluster.manifests.make import make_manifest
    from cluster.manifests.settings import Settings

    place = given_workspace(context)
    if place is None:
        raise click.UsageError("say where runs lie there: tenure --workspace /SHARED/FOLDER cluster manifest ...")
    text = make_manifest(kind, spec, Settings(workspace=place, **settings), run_id)  # type: ignore[arg-type]
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)
