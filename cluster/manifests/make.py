"""One manifest by its kind."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import kuberay, launcher, slurm
from cluster.manifests.settings import Settings
from training.errors import fail
from training.spec import RunSpec, Scaling
from training.specfile import load_spec

_Make = Callable[[str, Path, str, Scaling, Settings], Any]
# What each kind is made by: a script, one document, or several.
KINDS: dict[str, _Make] = {
    "rayjob": kuberay.rayjob,
    "rayservice": kuberay.rayservice,
    "raycluster": kuberay.raycluster,
    "slurm": slurm.sbatch,
    "aws": launcher.aws,
    "gcp": launcher.gcp,
    "onprem": launcher.onprem,
}


def make_manifest(kind: str, spec: Path, settings: Settings, run_id: str | None = None) -> str:
    """The text of a manifest: YAML, or for Slurm a script.

    Args:
        spec: a run, a sweep or a sequence; for rayservice that of the run to serve.
        run_id: default: the spec's name, or for a sweep always that.

    Raises:
        TenureError: there is no such kind, the spec is not valid, or something that the kind needs is missing.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        instead = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(KINDS)}"
        raise fail(f"'{kind}' is no kind of manifest", "--for", instead)
    settings.check()
    command, name, scaling = read(spec)
    made = KINDS[kind](command, spec, run_id or name, scaling, settings)
    if isinstance(made, str):
        return made
    return yaml.safe_dump_all(made if isinstance(made, list) else [made], sort_keys=False)


def read(path: Path) -> tuple[str, str, Scaling]:
    """The command that runs a spec, its name and its scaling."""
    from sweeps.loading import is_sweep, load_sweep
    from training.sequences.steps import is_sequence, load_sequence

    if is_sweep(path):
        sweep, _ = load_sweep(path, look_at_files=False)
        return "sweep", sweep.title, sweep.run.scaling
    if is_sequence(path):
        sequence = load_sequence(path, look_at_files=False)
        return "sequence", sequence.name, sequence.scaling
    spec: RunSpec = load_spec(path, look_at_files=False)
    return "train", spec.name, spec.scaling
