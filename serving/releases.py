"""Releases: which run's artifact goes by an alias, as aliases and tags of MLflow's registry, with a way back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from serving.artifacts import artifact_problems
from training.errors import Problem, fail, raise_all
from training.evaluation.scorecard import Scorecard, read_scorecard
from training.mlflow_store import client
from training.models import hash_folder
from training.spec import RunSpec
from training.workspace import MERGED_FOLDER, RunFolder, Workspace, read_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_TAG = "tenure.release"
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
_RESERVED = re.compile(r"latest|v\d+")  # MLflow's own


@dataclass(frozen=True)
class Release:
    """A version of a registered model that has been promoted to an alias."""

    alias: str
    model: str
    version: str
    run: str
    verdict: str
    promoted: str
    override: str
    current: bool


def check_alias(alias: str) -> None:
    """Refuse what cannot be an alias.

    Raises:
        TenureError: it is none, or a word that MLflow keeps for itself.
    """
    if not _ALIAS.fullmatch(alias) or _RESERVED.fullmatch(alias):
        raise fail(f"{alias[:80]!r} cannot be an alias", "--as", "use a lower-case word such as production")


def check_release(run: RunFolder, spec: RunSpec, scorecard: Scorecard, override: str | None) -> None:
    """Refuse what must not be released, with every reason at once.

    Raises:
        TenureError: the contract is broken or undecided and no reason was given to override it; the artifact or its
            base is not what was scored; its files cannot be served.
    """
    raise_all([*_contract_problems(run, scorecard, override), *_file_problems(run, spec, scorecard)])


def _contract_problems(run: RunFolder, scorecard: Scorecard, override: str | None) -> list[Problem]:
    verdict = scorecard.contract.verdict
    if verdict == "kept" or override:
        return []
    reasons = "; ".join(scorecard.contract.reasons) or "no reason is told"
    instead = 'train again, score on more items, or take it on yourself: --override "why"'
    return [Problem(f"the contract of run '{run.id}' is {verdict}: {reasons}", str(run.scorecard), instead)]


def _file_problems(run: RunFolder, spec: RunSpec, scorecard: Scorecard) -> list[Problem]:
    base = Path(spec.model)
    problems = artifact_problems(run.artifact, base)
    if run.artifact.is_dir() and hash_folder(run.artifact) != scorecard.artifact_hash:
        what, instead = "the artifact's files have changed since they were scored", "restore them, or train again"
        problems.append(Problem(what, str(run.artifact), instead))
    if not base.is_dir() or hash_folder(base) != scorecard.base_hash:
        what = "the base model is not the one that the run was scored against"
        problems.append(Problem(what, str(base), "restore it; an adapter fits its own base alone"))
    merged = run.artifact / MERGED_FOLDER
    told = read_json(run.registration).get("merged_hash") if run.registration.is_file() else None
    if merged.is_dir() and told is not None and hash_folder(merged) != told:
        problems.append(Problem("the merged model has changed since it was registered", str(merged), "train again"))
    return problems


def promote(workspace: Workspace, run: RunFolder, spec: RunSpec, alias: str, override: str | None, by: str) -> Release:
    """Give the alias to a run's registered version; another version that had it keeps its place in the history.

    Raises:
        TenureError: see check_alias and check_release; or the run is not registered.
    """
    check_alias(alias)
    scorecard = read_scorecard(run.scorecard)
    check_release(run, spec, scorecard, override)
    if not run.registration.is_file():
        raise fail(f"run '{run.id}' is not registered", str(run.path), f"tenure resume {run.id}")
    told = read_json(run.registration)
    store = client(workspace)
    tags = {"promoted": _now(), "by": by, "override": override or "", "rolled_back": ""}
    for name, value in tags.items():
        store.set_model_version_tag(told["name"], told["version"], f"{_TAG}.{alias}.{name}", value)
    _give(store, alias, told["name"], str(told["version"]))
    return next(release for release in releases(workspace, alias) if release.current)


def releases(workspace: Workspace, alias: str | None = None) -> list[Release]:
    """Every release, or those of one alias, the newest first; those that were rolled back are left out."""
    found = [release for version in _versions(client(workspace)) for release in _of(version)]
    kept = [release for release in found if alias in (None, release.alias)]
    return sorted(kept, key=lambda release: release.promoted, reverse=True)


def current_release(workspace: Workspace, alias: str) -> Release | None:
    """What goes by an alias now."""
    return next((release for release in releases(workspace, alias) if release.current), None)


def roll_back(workspace: Workspace, alias: str, reason: str, to: str | None = None) -> tuple[Release, Release]:
    """Give the alias back to the release before (or to that of a run); what it is taken from, and to whom it goes.

    Raises:
        TenureError: nothing goes by the alias, or there is no release to go back to.
    """
    history = releases(workspace, alias)
    now = next((release for release in history if release.current), None)
    if now is None:
        raise fail(f"nothing goes by the alias '{alias}'", "", "tenure releases lists what there is")
    others = [release for release in history if not release.current and release.promoted <= now.promoted]
    others = [release for release in history if release.run == to] if to else others
    if not others:
        what = f"'{alias}' has no release of run '{to}'" if to else f"'{alias}' has no release before this one"
        raise fail(what, "", "tenure releases lists what there is; tenure promote RUN makes another")
    store = client(workspace)
    store.set_model_version_tag(now.model, now.version, f"{_TAG}.{alias}.rolled_back", f"{_now()} {reason}")
    _give(store, alias, others[0].model, others[0].version)
    return now, others[0]


def _give(store: MlflowClient, alias: str, model: str, version: str) -> None:
    """The alias belongs to one version of one model at a time."""
    store.set_registered_model_alias(model, alias, version)
    for name in {found.name for found in _versions(store)} - {model}:
        if alias in store.get_registered_model(name).aliases:
            store.delete_registered_model_alias(name, alias)


def _versions(store: MlflowClient) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = store.search_model_versions(max_results=1000, page_token=token)
        found += [store.get_model_version(version.name, version.version) for version in page if _is_ours(version)]
        token = page.token
        if not token:
            return found


def _is_ours(version: ModelVersion) -> bool:
    return any(name.startswith(_TAG) for name in version.tags)


def _of(version: ModelVersion) -> Sequence[Release]:
    tags = version.tags
    suffix = ".promoted"
    aliases = [name[len(_TAG) + 1 : -len(suffix)] for name in tags if name.startswith(_TAG) and name.endswith(suffix)]
    return [
        Release(
            alias=alias,
            model=version.name,
            version=str(version.version),
            run=tags.get("run", ""),
            verdict=tags.get("contract", ""),
            promoted=tags[f"{_TAG}.{alias}{suffix}"],
            override=tags.get(f"{_TAG}.{alias}.override", ""),
            current=alias in version.aliases,
        )
        for alias in aliases
        if not tags.get(f"{_TAG}.{alias}.rolled_back") or alias in version.aliases
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
