"""The endpoint of a scored run as a Serve application, for a RayService or `serve deploy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.quiet import be_quiet
from training.workspace import Workspace

if TYPE_CHECKING:
    from ray.serve import Application


def application(args: dict[str, str]) -> Application:
    """What `tenure serve` deploys for a run, an alias or a serving spec, for all hosts to ask: keys are wanted.

    Args:
        args: `workspace`, and `run`.

    Raises:
        TenureError: there is no such run, it was not scored, or its artifact has changed since.
    """
    be_quiet()
    from cluster.serving import fleet_of, read_serving_spec
    from serving.app import build_application
    from serving.files import ServingFolder
    from serving.spec import Access

    workspace = Workspace.at(args["workspace"])
    spec = read_serving_spec(args["run"], workspace, "0.0.0.0", None)
    access = Access(
        folder=ServingFolder(workspace.root / "serving").path,
        keys=spec.keys,
        host=spec.host,
        limits=spec.limits,
        moderation=spec.moderation,
        price_per_hour=spec.price_per_hour,
    )
    return build_application(fleet_of(spec, workspace)[0], access)
