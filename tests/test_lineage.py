"""Where a base model came from, and which suites its descendants watch because of that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_command import run_tenure
from tiny import make_tiny_adapter
from tiny_spec import sums, write_rows, write_tiny_spec

from cluster.pipeline import read_spec, start_run
from serving.registry import register
from training.errors import TenureError
from training.evaluation.scorecard import Scorecard, Verdict
from training.lineage import describe_lineage, find_ancestor, find_base, inherit_suites, run_of_model
from training.models import hash_folder
from training.spec import RunSpec
from training.stages import hash_spec, plan_run
from training.workspace import LINEAGE_FILE, MERGED_FOLDER, RunFolder, Workspace, read_json, write_json


def finished_run(folder: Path, model: Path, name: str, amend: dict[str, Any] | None = None) -> RunFolder:
    """A run that was planned and tracked, with its base as its artifact: nothing here depends on the weights."""
    path = write_tiny_spec(folder / name, model, tuning={"type": "full"})
    change(path, {"name": name, **(amend or {})})
    workspace = Workspace.at(folder / "workspace")
    spec = read_spec(path, workspace)
    run = start_run(path, spec, plan_run(spec, workspace)[0], workspace)
    shutil.copytree(spec.model, run.artifact)
    write_json(run.artifact / LINEAGE_FILE, {"run": run.id, "base_hash": hash_folder(Path(spec.model))})
    return run


def change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))


def spec_from(folder: Path, model: Path | str, suite: str = "fresh", **suites: Any) -> RunSpec:
    """The spec of a new run in the same workspace, with one target suite of its own and no other."""
    path = write_tiny_spec(folder / "new", Path("unused"))
    write_rows(folder / "new" / "fresh.jsonl", sums(5))
    target = {"name": suite, "path": "fresh.jsonl", "metric": "exact_match", "prompt": "question"}
    change(path, {"model": str(model), "suites": {"target": [target | {"completion": "answer"}], **suites}})
    return read_spec(path, Workspace.at(folder / "workspace"))


def inherited(spec: RunSpec) -> dict[str, str | None]:
    return {suite.name: suite.inherited_from for suite in spec.suites.retention}


def test_targets_of_the_base_s_run_are_retained_and_told(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model, "first", {"contract": {"min_gain": 0.5}})
    spec = spec_from(tmp_path, run.artifact)
    assert inherited(spec) == {"sums": "first-1"}  # the run's own retention suite stays its own
    told = describe_lineage(spec, Workspace.at(tmp_path / "workspace"))
    assert told == "the base is an artifact of run first-1; retention suites of earlier runs: sums (run first-1)"


def test_the_chain_goes_on_over_generations(tmp_path: Path, tiny_model: Path) -> None:
    first = finished_run(tmp_path, tiny_model, "first")
    suite = {"name": "more", "path": "sums.jsonl", "metric": "cross_entropy", "prompt": "question"}
    amend = {"model": str(first.artifact), "suites": {"target": [suite | {"completion": "answer"}]}}
    second = finished_run(tmp_path, tiny_model, "second", amend)
    assert inherited(spec_from(tmp_path, second.artifact)) == {"more": "second-1", "sums": "first-1"}
    assert read_json(second.lineage)["parent"] == {"run": "first-1"}


def test_it_is_switched_off_by_a_key(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model, "first")
    spec = spec_from(tmp_path, run.artifact, inherit=False)
    assert inherited(spec) == {}
    assert "not inherited" in describe_lineage(spec, Workspace.at(tmp_path / "workspace"))


def test_a_name_that_is_taken_gets_the_run_s_name_behind_it(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model, "first")
    assert inherited(spec_from(tmp_path, run.artifact, suite="sums")) == {"sums.first-1": "first-1"}


def test_a_suite_that_is_there_already_is_not_added_again(tmp_path: Path, tiny_model: Path) -> None:
    """The same questions to a copy of the same file: as a target it stays one, as a retention suite it is marked."""
    run = finished_run(tmp_path, tiny_model, "first")
    same = {"name": "old-sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "question"}
    same |= {"completion": "answer", "max_new_tokens": 4}
    as_retention = spec_from(tmp_path, run.artifact, retention=[same])
    assert inherited(as_retention) == {"old-sums": "first-1"}
    assert inherited(inherit_suites(as_retention, Workspace.at(tmp_path / "workspace"))) == {"old-sums": "first-1"}
    assert inherited(spec_from(tmp_path, run.artifact, target=[same])) == {}


def test_a_file_that_is_gone_is_one_error_and_a_changed_one_is_told(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model, "first")
    file = tmp_path / "first" / "sums.jsonl"
    write_rows(file, sums(6))
    told = describe_lineage(spec_from(tmp_path, run.artifact), Workspace.at(tmp_path / "workspace"))
    assert f"the file of sums has changed since run first-1: {file}" in told
    file.unlink()
    with pytest.raises(TenureError) as raised:
        spec_from(tmp_path, run.artifact)
    (problem,) = raised.value.problems
    assert (problem.what, problem.where) == (
        "suite 'sums' of run 'first-1', which the base model came from, is gone",
        str(file),
    )
    assert problem.instead.endswith("set suites: {inherit: false}")


def registered(run: RunFolder, workspace: Workspace) -> None:
    spec = RunSpec.model_validate(read_json(run.spec))
    verdict = Verdict(verdict="kept", min_gain=0, max_loss=1, reasons=())
    card = Scorecard.model_construct(artifact_hash=hash_folder(run.artifact), base_hash="b", contract=verdict)
    register(workspace, run, spec, card)
    from training.mlflow_store import client
    from training.tracking import tracking_id_of

    for file in (run.spec, run.lineage):
        client(workspace).log_artifact(tracking_id_of(run), str(file))


def test_an_artifact_that_was_moved_is_known_by_its_hash(tmp_path: Path, tiny_model: Path) -> None:
    workspace, run = Workspace.at(tmp_path / "workspace"), finished_run(tmp_path, tiny_model, "first")
    shutil.copytree(run.artifact, tmp_path / "elsewhere")
    spec = spec_from(tmp_path, tmp_path / "elsewhere")
    assert inherited(spec) == {}
    assert "which is not known here" in describe_lineage(spec, workspace)
    registered(run, workspace)
    shutil.rmtree(run.path)
    assert inherited(spec_from(tmp_path, tmp_path / "elsewhere")) == {"sums": "first-1"}


def test_a_base_goes_by_run_and_by_registered_version(tmp_path: Path, tiny_model: Path) -> None:
    workspace, run = Workspace.at(tmp_path / "workspace"), finished_run(tmp_path, tiny_model, "first")
    registered(run, workspace)
    for name in ("first-1", "models:/first/1", str(run.artifact)):
        assert find_base(name, workspace) == run.artifact
        assert inherited(spec_from(tmp_path, name)) == {"sums": "first-1"}
    with pytest.raises(ValueError, match="the registry has no 'models:/first/7'"):
        find_base("models:/first/7", workspace)
    with pytest.raises(ValueError, match="names no version -> give models:/NAME/VERSION"):
        find_base("models:/first", workspace)


def test_an_adapter_goes_on_as_its_merged_model(tmp_path: Path, tiny_model: Path) -> None:
    workspace, run = Workspace.at(tmp_path / "workspace"), finished_run(tmp_path, tiny_model, "first")
    shutil.rmtree(run.artifact)
    make_tiny_adapter(tiny_model, run.artifact)
    write_json(run.artifact / LINEAGE_FILE, {"run": run.id})
    with pytest.raises(ValueError, match=r"an adapter, and .* -> train it with export: \{merged: true\}"):
        find_base("first-1", workspace)
    shutil.copytree(tiny_model, run.artifact / MERGED_FOLDER)
    merged = find_base(str(run.artifact), workspace)
    assert merged == run.artifact / MERGED_FOLDER
    assert run_of_model(merged) == "first-1"
    ancestor = find_ancestor(merged, workspace)
    assert ancestor is not None
    assert ancestor.run == "first-1"


def test_a_model_of_no_run_inherits_nothing(tmp_path: Path, tiny_model: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    spec = spec_from(tmp_path, tiny_model)
    assert inherited(spec) == {}
    assert describe_lineage(spec, workspace) == ""
    assert hash_spec(inherit_suites(spec, workspace)) == hash_spec(spec)


def test_check_tells_what_is_inherited(tmp_path: Path, tiny_model: Path) -> None:
    run = finished_run(tmp_path, tiny_model, "first")
    spec_from(tmp_path, run.artifact)
    done = run_tenure(tmp_path, "check", str(tmp_path / "new" / "spec.yaml"))
    assert done.returncode == 0, done.stderr
    assert "retention suites of earlier runs: sums (run first-1)" in done.stdout
