"""Reads the spec of a sweep from its file, with its base run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeps.space import check_space
from sweeps.spec import SweepSpec
from training.spec import RunSpec
from training.specfile import load_spec, read_section
from training.yamlfile import read_yaml


def is_sweep(path: Path) -> bool:
    """Whether a spec file is that of a sweep."""
    return "base" in read_yaml(path)[0]


def load_sweep(
    path: Path,
    *,
    look_at_files: bool = True,
    find_model: Callable[[str], str | Path] | None = None,
    complete: Callable[[RunSpec], RunSpec] = lambda spec: spec,
) -> tuple[SweepSpec, list[str]]:
    """The validated sweep in a YAML file with its base as a run spec, and what a user should know about its space.

    Args:
        look_at_files, find_model: as for specfile.load_spec().
        complete: adds to the base what is not in its file, such as the suites of presets.

    Raises:
        TenureError: with every fault found, those of the base included.
    """
    context = {"folder": path.parent, "look_at_files": look_at_files, "find_model": find_model}
    sweep, _ = read_section(SweepSpec, path, context)
    base = sweep.base
    if not isinstance(base, RunSpec):
        base = load_spec(path.parent / base, look_at_files=look_at_files, find_model=find_model)
    whole = sweep.model_copy(update={"base": complete(base)})
    return whole, check_space(whole)
