"""`tenure restore`: a run from its copy in object storage, into a workspace that lost it or never had it."""

from __future__ import annotations

import click

from training.workspace import RunFolder, Workspace, read_json


@click.command("restore")
@click.argument("url", metavar="STORE/RUN")
@click.pass_context
def restore_command(context: click.Context, url: str) -> None:
    """Bring a run back from the copy that scaling.copy_to kept, as in s3://bucket/runs/my-first-1."""
    from training.checkpoint import latest_checkpoint

    run = restore(url, context.obj)
    newest = latest_checkpoint(run.checkpoints)
    click.echo(f"restored {run.path}, checkpoint {newest.name if newest else 'none'}")
    click.echo(f"go on with: tenure resume {run.id}")


def restore(url: str, workspace: Workspace) -> RunFolder:
    """The run of a copy, in this workspace and known to its tracking store.

    Raises:
        TenureError: there is no copy there, or the workspace has a run of that id.
    """
    from training.copies import restore_run
    from training.plan import Plan
    from training.stages import spec_of
    from training.tracking import is_tracked, start_tracking

    run = restore_run(url, workspace)
    if not is_tracked(workspace, run):
        plan, lineage = Plan(**read_json(run.plan)), read_json(run.lineage)
        start_tracking(workspace, run, spec_of(run), plan, lineage)
    return run
