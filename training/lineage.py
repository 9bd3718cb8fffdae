"""Where a base model came from: the run whose artifact it is, and what that run's lineage asks to be retained.

An artifact names its run in `tenure.json`. The run's spec lies in the run's folder; where the artifact was moved, the
registry knows the run by the artifact's hash, and holds its spec. Free of torch.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.locations import Location, hash_data, is_there
from training.errors import Problem, fail, raise_all
from training.mlflow_store import client
from training.models import find_model, hash_folder
from training.spec import RunSpec
from training.suite_spec import AnySuite
from training.workspace import LINEAGE_FILE, MERGED_FOLDER, RunFolder, Workspace, read_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REGISTRY = "models:/"
_LONGEST_NAME = 63


# ------------------------------------------------------------------------------------------------ base models


def find_base(name: str, workspace: Workspace) -> Path:
    """The local folder of a whole model: as for find_model(), or what a run or a registered version left.

    A run goes by its id (`my-first-1`), a registered version by MLflow's address (`models:/my-first/1`, or
    `models:/my-first@production`). An adapter is there as it was folded into its base.

    Raises:
        ValueError: "reason -> what to do", when it is nowhere to be found or not whole.
    """
    if name.startswith(REGISTRY):
        return _whole(_registered(name, workspace), name)
    folder, run = Path(name).expanduser(), RunFolder(workspace.runs / name)
    if (folder / "adapter_config.json").is_file():
        return _whole(folder.absolute(), name)
    if not folder.is_dir() and "/" not in name and run.spec.is_file():
        return _whole(run.artifact, name)
    return find_model(name, workspace)


def _registered(name: str, workspace: Workspace) -> Path:
    """The artifact that the registry keeps under a name and a version or an alias."""
    from mlflow.exceptions import MlflowException

    model, at, alias = name.removeprefix(REGISTRY).partition("@")
    model, _, version = (model, "", "") if at else model.partition("/")
    if not model or not (alias or version):
        raise ValueError(f"'{name}' names no version -> give models:/NAME/VERSION or models:/NAME@ALIAS")
    try:
        store = client(workspace)
        found = store.get_model_version_by_alias(model, alias) if at else store.get_model_version(model, version)
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the registry has no '{name}': {reason} -> tenure runs lists the runs there are") from None
    return Path(str(found.source).removeprefix("file://"))


def _whole(artifact: Path, name: str) -> Path:
    """The artifact itself, or of an adapter the model that it was folded into."""
    if not artifact.is_dir():
        raise ValueError(f"'{name}' has no artifact at {artifact} -> go on with its run: tenure resume RUN")
    if not (artifact / "adapter_config.json").is_file():
        return artifact
    merged = artifact / MERGED_FOLDER
    if not merged.is_dir():
        what = f"'{name}' is an adapter, and a run goes on from a whole model"
        raise ValueError(f"{what} -> train it with export: {{merged: true}}, or give its base")
    return merged


# ------------------------------------------------------------------------------------------------- ancestors


@dataclass(frozen=True)
class Ancestor:
    """The run that a base model came from: its spec, and the hashes of its suites' files then, by path."""

    run: str
    spec: RunSpec
    suite_hashes: dict[str, str]


def run_of_model(model: Path) -> str | None:
    """The id of the run whose artifact a model is; None where it is none."""
    file = _about(model)
    return str(read_json(file).get("run") or "") or None if file else None


def _about(model: Path) -> Path | None:
    """What an artifact says of itself; a merged model lies inside its artifact."""
    folders = (model, model.parent) if model.name == MERGED_FOLDER else (model,)
    return next((folder / LINEAGE_FILE for folder in folders if (folder / LINEAGE_FILE).is_file()), None)


def find_ancestor(model: Path, workspace: Workspace) -> Ancestor | None:
    """The run that a model came from; None where it came from none, or nobody knows that run any more.

    Raises:
        TenureError: the tracking store does not answer.
    """
    run = run_of_model(model)
    if run is None:
        return None
    for folder in (model.parent, model.parent.parent):
        if folder.name == run and (folder / "spec.json").is_file():
            return _ancestor(run, folder)
    return _ancestor_by_hash(run, model, workspace)


def _ancestor(run: str, folder: Path) -> Ancestor:
    lineage = read_json(folder / "lineage.json") if (folder / "lineage.json").is_file() else {}
    return Ancestor(run, RunSpec.model_validate(read_json(folder / "spec.json")), lineage.get("suites", {}))


def _ancestor_by_hash(run: str, model: Path, workspace: Workspace) -> Ancestor | None:
    """The run that the registry knows by the hash of its artifact, with the spec that it was tracked with."""
    from mlflow.exceptions import MlflowException

    store = client(workspace)
    try:
        version = _version_of(model, store)
        if version is None:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("spec.json", "lineage.json"):
                store.download_artifacts(version.run_id, name, scratch)
            return _ancestor(version.tags.get("run", run), Path(scratch))
    except MlflowException as error:
        what = f"the base is an artifact of run '{run}', of which the tracking store cannot tell: "
        what += str(error).strip().splitlines()[0]
        raise fail(what, workspace.tracking_uri, "mend the store, or set suites: {inherit: false}") from None


def _version_of(model: Path, store: Any) -> ModelVersion | None:
    digest = hash_folder(model)
    for tag in ("artifact_hash", "merged_hash"):
        for version in store.search_model_versions(f"tags.{tag} = '{digest}'"):
            found: ModelVersion = version
            return found
    return None


# ------------------------------------------------------------------------------------------- inherited suites


def inherit_suites(spec: RunSpec, workspace: Workspace) -> RunSpec:
    """The spec with the targets of the runs that its base came from among its retention suites.

    A suite that the spec has already is not added again; one whose name is taken by another gets the name of its run
    after its own.

    Raises:
        TenureError: a file of such a suite is gone; names all of them.
    """
    ancestor = find_ancestor(Path(spec.model), workspace) if spec.suites.inherit else None
    if ancestor is None:
        return spec
    retention, targets = list(spec.suites.retention), spec.suites.target
    gone: list[Problem] = []
    for suite in _asked_for(ancestor):
        if any(_same(suite, target) for target in targets):
            continue
        there = next((index for index, one in enumerate(retention) if _same(suite, one)), None)
        if there is not None:
            retention[there] = retention[there].model_copy(update={"inherited_from": suite.inherited_from})
        elif (place := _data(suite)) is not None and not is_there(place):
            what = f"suite '{suite.name}' of run '{suite.inherited_from}', which the base model came from, is gone"
            gone.append(Problem(what, str(place), "restore the file, or set suites: {inherit: false}"))
        else:
            names = {one.name for one in (*targets, *retention)}
            retention.append(suite.model_copy(update={"name": _free_name(suite, names)}))
    raise_all(gone)
    return spec.model_copy(update={"suites": spec.suites.model_copy(update={"retention": tuple(retention)})})


def _asked_for(ancestor: Ancestor) -> list[AnySuite]:
    """What a run's descendants are to retain: its own targets, and what it inherited itself."""
    suites = ancestor.spec.suites
    own = [suite.model_copy(update={"min_gain": None, "inherited_from": ancestor.run}) for suite in suites.target]
    return [*own, *(suite for suite in suites.retention if suite.inherited_from is not None)]


def _same(suite: AnySuite, other: AnySuite) -> bool:
    """Whether two suites ask the same of the same file, whatever they promise and are called."""
    keys = {"name", "path", "min_gain", "max_loss", "inherited_from"}
    if type(suite) is not type(other) or suite.model_dump(exclude=keys) != other.model_dump(exclude=keys):
        return False
    first, second = _data(suite), _data(other)
    if first == second or first is None or second is None:
        return first == second
    return is_there(first) and is_there(second) and hash_data(first) == hash_data(second)


def _data(suite: AnySuite) -> Location | None:
    """Where the items of a suite lie, where it has a place."""
    path = getattr(suite, "path", None)
    return path if isinstance(path, Path | str) else None


def _free_name(suite: AnySuite, taken: set[str]) -> str:
    """The suite's name, or where that is taken, followed by its run's."""
    if suite.name not in taken:
        return str(suite.name)
    tail = f".{suite.inherited_from}"
    name = f"{suite.name[: max(1, _LONGEST_NAME - len(tail))]}{tail}"[:_LONGEST_NAME]
    number = 2
    while name in taken:
        name, number = f"{name[: _LONGEST_NAME - 4]}.{number}", number + 1
    return name


def describe_lineage(spec: RunSpec, workspace: Workspace) -> str:
    """What a run watches because of where its base came from, in words; empty when there is nothing to tell."""
    run = run_of_model(Path(spec.model))
    if run is None:
        return ""
    if not spec.suites.inherit:
        return f"the base is an artifact of run {run}; its suites are not inherited (suites: {{inherit: false}})"
    ancestor = find_ancestor(Path(spec.model), workspace)
    if ancestor is None:
        return f"the base is an artifact of run {run}, which is not known here: its suites are not inherited"
    watched = [suite for suite in spec.suites.retention if suite.inherited_from is not None]
    told = ", ".join(f"{suite.name} (run {suite.inherited_from})" for suite in watched) or "none that are not its own"
    lines = [f"the base is an artifact of run {run}; retention suites of earlier runs: {told}"]
    for suite in watched:
        if _changed(suite, ancestor):
            lines.append(f"the file of {suite.name} has changed since run {run}: {_data(suite)}")
    return "\n".join(lines)


def _changed(suite: AnySuite, ancestor: Ancestor) -> bool:
    place = _data(suite)
    known = ancestor.suite_hashes.get(str(place))
    return place is not None and known is not None and known != hash_data(place)
