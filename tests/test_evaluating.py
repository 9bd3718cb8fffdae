"""What `tenure eval` scores, and what it refuses; scoring itself is tested with the jobs that are submitted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_spec import write_tiny_spec

from cluster.evaluating import claim, evaluate, find_artifact, scored_spec
from training.errors import TenureError
from training.specfile import load_spec
from training.workspace import Workspace

THIS = {"artifact": "/a", "artifact_hash": "1", "spec_hash": "2"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


def test_a_run_goes_by_its_id_and_an_artifact_by_its_folder(workspace: Workspace, tmp_path: Path) -> None:
    run = workspace.runs / "far-1"
    (run / "artifact").mkdir(parents=True)
    assert find_artifact("far-1", workspace) == run / "artifact"
    (tmp_path / "given").mkdir()
    assert find_artifact(str(tmp_path / "given"), workspace) == tmp_path / "given"


def test_what_is_not_there_is_told(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.runs / "far-1").mkdir(parents=True)
    for subject, told in (("far-1", "has no artifact"), ("far-2", "did you mean 'far-1'"), ("/no/where", "no folder")):
        with pytest.raises(TenureError, match=told):
            find_artifact(subject, workspace)


def test_under_an_id_the_same_is_scored_again_and_nothing_else(workspace: Workspace) -> None:
    folder = claim(workspace, "mine", "tiny", THIS)
    assert folder.path == workspace.root / "evals" / "mine"
    assert claim(workspace, "mine", "tiny", THIS) == folder
    with pytest.raises(TenureError, match="'mine' is that of another evaluation"):
        claim(workspace, "mine", "tiny", {**THIS, "artifact_hash": "3"})
    names = [claim(workspace, None, "tiny", THIS).id for _ in range(2)]
    assert names == ["tiny-1", "tiny-2"]


def test_a_whole_model_is_scored_as_one_whatever_the_spec_tunes(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tiny_model, tuning={"type": "lora", "rank": 4})
    spec = load_spec(path, find_model=Path)
    assert scored_spec(spec, tiny_model).tuning.type == "full"


def test_pickled_weights_are_refused_before_ray_is_started(
    tiny_model: Path, workspace: Workspace, tmp_path: Path
) -> None:
    path = write_tiny_spec(tmp_path, tiny_model)
    shutil.copytree(tiny_model, tmp_path / "odd")
    (tmp_path / "odd" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(TenureError, match="pickled weights"):
        evaluate(path, str(tmp_path / "odd"), workspace)
    assert not (workspace.root / "evals").exists()
