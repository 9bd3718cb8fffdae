"""The commands that submit runs to a cluster and follow them: submit, jobs, status, logs, stop."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cluster.jobs import Job

ADDRESS = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The head's dashboard, http://HOST:8265; also from RAY_API_SERVER_ADDRESS.",
)
JOB = click.argument("job", metavar="ID")
KINDS = ["train", "sweep", "sequence", "eval", "serve"]


@click.command("submit")
@click.argument("kind", metavar="|".join(KINDS), type=click.Choice(KINDS))
@click.argument("subject", metavar="SPEC")
@ADDRESS
@click.option("--id", "run_id", help="The run's id. Default: the spec's name and the time; of a sweep its name.")
@click.option("--of", metavar="RUN|FOLDER", help="For eval: a run of that workspace, or an artifact's absolute path.")
@click.option("-f", "--follow", is_flag=True, help="Show what it writes until it ends, and end with its status.")
@click.pass_context
def submit_job(
    context: click.Context, kind: str, subject: str, address: str, run_id: str | None, of: str | None, follow: bool
) -> None:
    """Submit SPEC (to serve, a run) to a cluster. --workspace is a folder there that every node sees."""
    from cluster.jobs import submit

    place = given_workspace(context)
    if place is None:
        raise click.UsageError("say where runs lie on the cluster: tenure --workspace /SHARED/FOLDER submit ...")
    chosen, packed = submit(kind, subject, address=address, workspace=place, run_id=run_id, of=of)  # type: ignore[arg-type]
    click.echo(f"submitted {chosen}: {len(packed.files)} files of {packed.num_bytes / 2**20:.1f} MiB beside the code")
    for path in packed.shared:
        click.echo(f"  every node must see {path}")
    if follow:
        _follow(chosen, address)
    else:
        click.echo(f"follow it with: tenure logs -f {chosen} --address {address}")


@click.command("jobs")
@ADDRESS
def show_jobs(address: str) -> None:
    """List the jobs that Tenure submitted to a cluster, newest first."""
    from cluster.jobs import list_jobs
    from cluster.screen import make_screen, table

    rows = [(job.id, job.command, job.told, _ran(job), job.workspace) for job in list_jobs(address)]
    make_screen().print(table(("job", "command", "state", "ran", "workspace"), rows))


@click.command("status")
@JOB
@ADDRESS
def show_status(job: str, address: str) -> None:
    """Show how a submitted run stands, and the last it wrote."""
    from cluster.jobs import job_of, logs_of
    from cluster.screen import facts, make_screen

    found, console = job_of(job, address), make_screen()
    told = {"job": found.id, "command": found.command, "state": found.told, "ran": _ran(found)}
    console.print(facts({**told, "workspace": found.workspace, "Ray says": found.message}), markup=True)
    console.print("\n".join(logs_of(job, address).splitlines()[-5:]), markup=False, soft_wrap=True)


@click.command("logs")
@JOB
@ADDRESS
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends, and end with its status.")
def show_logs(job: str, address: str, follow: bool) -> None:
    """Print what a submitted run has written."""
    from cluster.jobs import logs_of

    if follow:
        _follow(job, address)
    else:
        click.echo(logs_of(job, address), nl=False)


@click.command("stop")
@JOB
@ADDRESS
def stop_job(job: str, address: str) -> None:
    """Stop a submitted run; its checkpoints stay, and tenure resume goes on from them."""
    from cluster.jobs import stop

    click.echo(f"{job}: {stop(job, address).told}")


def resume_job(context: click.Context, run: str, address: str) -> None:
    """`tenure resume RUN --address http://...`."""
    from cluster.jobs import resume

    resume(run, address=address, workspace=given_workspace(context))
    click.echo(f"submitted {run} again\nfollow it with: tenure logs -f {run} --address {address}")


def given_workspace(context: click.Context) -> str | None:
    """--workspace or TENURE_WORKSPACE as it was given; its default means this machine, and not the cluster's."""
    root = context.find_root()
    default = root.get_parameter_source("workspace") is click.core.ParameterSource.DEFAULT
    return None if default else str(root.params["workspace"])


def _follow(job: str, address: str) -> None:
    from cluster.jobs import follow

    ended = follow(job, address, lambda text: click.echo(text, nl=False))
    if ended.state != "SUCCEEDED":
        sys.exit(ended.exit_status if ended.exit_status and ended.exit_status > 0 else 1)


def _ran(job: Job) -> str:
    if job.started_s is None:
        return "not yet"
    seconds = round((job.ended_s or time.time()) - job.started_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


COMMANDS = (submit_job, show_jobs, show_status, show_logs, stop_job)
