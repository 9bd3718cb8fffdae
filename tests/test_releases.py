"""Releases: what may be promoted, what is recorded, and the way back; without Ray or an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from test_lineage import finished_run
from test_report import asdiv, scorecard
from tiny import make_tiny_adapter, make_tiny_model

from cluster.cli import cli
from serving.artifacts import artifact_problems
from serving.audit import read_acts
from serving.registry import register
from serving.releases import promote, releases
from training.errors import TenureError
from training.evaluation.scorecard import Verdict
from training.models import hash_folder
from training.spec import RunSpec
from training.workspace import RunFolder, Workspace, read_json, write_json


def tenure(workspace: Workspace, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--workspace", str(workspace.root), *arguments])


def scored(folder: Path, model: Path, name: str, verdict: Any = "kept") -> RunFolder:
    """A registered run whose contract came to a verdict."""
    run = finished_run(folder, model, name)
    reasons = () if verdict == "kept" else ("asdiv gained nothing",)
    card = scorecard(asdiv(), run=run.id).model_copy(
        update={
            "artifact_hash": hash_folder(run.artifact),
            "base_hash": hash_folder(model),
            "contract": Verdict(verdict=verdict, min_gain=0, max_loss=1, reasons=reasons),
        }
    )
    run.scorecard.write_text(card.model_dump_json(), encoding="utf-8")
    spec = RunSpec.model_validate(read_json(run.spec))
    made = register(Workspace.at(folder / "workspace"), run, spec, card)
    write_json(run.registration, {"name": made.name, "version": made.version})
    return run


def spec_of(run: RunFolder) -> RunSpec:
    return RunSpec.model_validate(read_json(run.spec))


def test_an_alias_goes_from_release_to_release_and_back(tmp_path: Path, tiny_model: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    for name in ("first", "second"):
        scored(tmp_path, tiny_model, name)
        done = tenure(workspace, "promote", f"{name}-1", "--as", "production")
        assert done.exit_code == 0, done.output
    assert [(found.run, found.current) for found in releases(workspace)] == [("second-1", True), ("first-1", False)]
    assert "production is first version 1, run first-1, again" in tenure(
        workspace, "rollback", "production", "--reason", "worse"
    ).output.replace("\n", " ")
    assert [(found.run, found.current) for found in releases(workspace)] == [("first-1", True)]
    again = tenure(workspace, "rollback", "production")
    assert isinstance(again.exception, TenureError)
    assert "no release before" in str(again.exception)
    acts = read_acts(workspace.root / "serving" / "audit.jsonl")
    assert [act["act"] for act in acts] == ["promoted", "promoted", "rolled back in the registry"]
    assert acts[-1]["why"] == "worse"
    assert "first-1" in tenure(workspace, "releases").output


@pytest.mark.parametrize("verdict", ["broken", "undecided"])
def test_a_contract_that_is_not_kept_stops_a_release_unless_somebody_takes_it_on(
    tmp_path: Path, tiny_model: Path, verdict: str
) -> None:
    workspace, run = Workspace.at(tmp_path / "workspace"), scored(tmp_path, tiny_model, "bad", verdict)
    refused = tenure(workspace, "promote", run.id)
    assert isinstance(refused.exception, TenureError)
    assert f"is {verdict}: asdiv gained nothing" in str(refused.exception)
    assert releases(workspace) == []
    assert tenure(workspace, "promote", run.id, "--override", "the boss wants it").exit_code == 0
    (found,) = releases(workspace, "production")
    assert (found.verdict, found.override) == (verdict, "the boss wants it")
    assert read_acts(workspace.root / "serving" / "audit.jsonl")[-1]["override"] == "the boss wants it"


def test_files_that_are_not_what_was_scored_stop_a_release_with_every_reason(tmp_path: Path, tiny_model: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    workspace, run = Workspace.at(tmp_path / "workspace"), scored(tmp_path, base, "first")
    (run.artifact / "pytorch_model.bin").write_bytes(b"\x80\x04")
    weights = load_file(run.artifact / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    save_file(
        {f"{key}x" if key == name else key: value for key, value in weights.items()}, run.artifact / "model.safetensors"
    )
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    with pytest.raises(TenureError) as caught:
        promote(workspace, run, spec_of(run), "production", "all of it", "me")
    told = " ".join(problem.what for problem in caught.value.problems)
    for part in (
        "pickled",
        f"lacks the tensor {name}",
        f"holds {name}x",
        "changed since they were scored",
        "base model",
    ):
        assert part in told


@pytest.mark.parametrize("alias", ["", "V 1", "latest", "v3", "../x", "a:b", "Production"])
def test_words_that_are_no_alias_are_refused(tmp_path: Path, alias: str) -> None:
    done = tenure(Workspace.at(tmp_path), "promote", "any-1", "--as", alias)
    assert isinstance(done.exception, TenureError)
    assert "cannot be an alias" in str(done.exception)


def test_an_adapter_for_another_base_is_told(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_tiny_adapter(base, tmp_path / "adapter", 1)
    assert artifact_problems(adapter, base) == []
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if ".lora_A." in name)
    save_file({key: value for key, value in whole.items() if key != name}, file)
    assert "lacks" in artifact_problems(adapter, base)[0].what
    save_file({**whole, name: torch.zeros(whole[name].shape[0], 3)}, file)
    assert "does not fit" in artifact_problems(adapter, base)[0].what
    save_file({key.replace("layers.0", "layers.7"): value for key, value in whole.items()}, file)
    assert "for another base" in artifact_problems(adapter, base)[0].what
    file.write_bytes(b"nothing")
    assert "cannot be read" in artifact_problems(adapter, base)[0].what
    shutil.rmtree(adapter)
    assert "no artifact" in artifact_problems(adapter, base)[0].what


def test_a_rollout_without_an_endpoint_says_so(tmp_path: Path, tiny_model: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    assert "nothing goes by the alias" in str(tenure(workspace, "rollout", "production").exception)
    scored(tmp_path, tiny_model, "first")
    tenure(workspace, "promote", "first-1")
    assert "no endpoint of this workspace runs" in str(tenure(workspace, "rollout").exception)
    (workspace.root / "serving" / "endpoint.json").write_text(json.dumps({"url": "x", "key": "y", "pid": 2**22 + 1}))
    assert "no endpoint of this workspace runs" in str(tenure(workspace, "rollout").exception)
