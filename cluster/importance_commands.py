"""The commands about importance: `tenure importance compute` and `tenure importance show`."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("importance")
def importance_group() -> None:
    """The importance of a base model's weights, for EWC and SI: computed once, shared by runs."""


@importance_group.command("compute")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.pass_context
def compute_importance(context: click.Context, spec: Path, address: str | None) -> None:
    """Compute what the protections of SPEC need, unless it is cached, and show it."""
    from cluster.importance import compute_importances

    compute_importances(spec, context.obj, address)


@importance_group.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
def show_importance(folder: Path) -> None:
    """Show what the importance in FOLDER was estimated from, and where in the model it is large."""
    from cluster.importance import print_importance

    print_importance(folder)
