"""The endpoint of a scored run as a Serve application, for a RayService or `serve deploy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.quiet import be_quiet
from training.workspace import Workspace

if TYPE_CHECKING:
    from ray.serve import Application


def application(args: dict[str, str]) -> Application:
    """Base and tuned model of a run behind one OpenAI endpoint.

    Args:
        args: `workspace` and `run`.

    Raises:
        TenureError: there is no such run, it was not scored, or its artifact has changed since.
    """
    be_quiet()
    from cluster.serving import served_models
    from serving.app import build_application
    from training.evaluation.scorecard import read_scorecard

    run = Workspace.at(args["workspace"]).run(args["run"])
    return build_application(served_models(run, read_scorecard(run.scorecard)))
