"""What `tenure eval` scores, and what it refuses; scoring itself is tested with the jobs that are submitted."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import make_tiny_adapter
from tiny_spec import write_tiny_spec

from cluster.comparing import compare
from cluster.evaluating import claim, evaluate, find_artifact, scored_spec
from training.errors import TenureError
from training.evaluation.comparison import compare_runs
from training.evaluation.scorecard import read_scorecard
from training.evaluation.scoring import ScoreJob, score_model
from training.specfile import load_spec
from training.workspace import Workspace

THIS = {"artifact": "/a", "artifact_hash": "1", "spec_hash": "2"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


@pytest.fixture(scope="module")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter")


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
        evaluate(path, [str(tmp_path / "odd")], workspace)
    assert not (workspace.root / "evals").exists()


def test_what_cannot_be_scored_side_by_side_is_refused_before_ray_is_started(
    tiny_model: Path, tiny_adapter: Path, workspace: Workspace, tmp_path: Path
) -> None:
    path = write_tiny_spec(tmp_path, tiny_model)
    with pytest.raises(TenureError, match="adapters and whole models are not scored in one go"):
        evaluate(path, [str(tiny_adapter), str(tiny_model)], workspace)
    with pytest.raises(TenureError, match="one id cannot be that of several"):
        evaluate(path, [str(tiny_adapter), str(tiny_adapter)], workspace, eval_id="mine")
    assert not (workspace.root / "evals").exists()


def test_several_artifacts_are_scored_at_once_and_compared_by_their_evaluations(
    tiny_model: Path, tiny_adapter: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scoring processes are run here, one after the other: what they are asked, and what comes of it."""
    path = write_tiny_spec(tmp_path, tiny_model)
    waves: list[int] = []

    def score_here(jobs: list[ScoreJob], *_: object) -> float:
        waves.append(len(jobs))
        return sum(score_model(job) for job in jobs)

    monkeypatch.setattr("cluster.pipeline.session", lambda *_: nullcontext())
    monkeypatch.setattr("training.waiting.waits_told", lambda *_: nullcontext())
    monkeypatch.setattr("training.processes.claim_of", lambda _: {})
    monkeypatch.setattr("training.stages.score_jobs", score_here)
    other = make_tiny_adapter(tiny_model, tmp_path / "other", seed=5)
    found = evaluate(path, [str(tiny_adapter), str(other), str(tiny_adapter)], workspace)
    assert [folder.id for folder, _ in found] == ["tiny-1", "tiny-2", "tiny-3"]
    assert waves == [1, 2], "the base first, then both adapters at once; the third is the first"
    hashes = [card.artifact_hash for _, card in found]
    assert hashes[0] == hashes[2] != hashes[1]
    assert [read_scorecard(folder.scorecard).run for folder, _ in found] == [folder.id for folder, _ in found]

    compare(workspace, ["evals/tiny-1", "evals/tiny-3"], as_json=False, seeds=False, page=None)
    assert (workspace.root / "compare" / "evals-tiny-1-evals-tiny-3.html").is_file()
    (itself,) = compare_runs([found[0][1], found[2][1]]).pairs
    assert all((suite.difference, suite.p_holm, suite.lost, suite.won) == (0, 1, (), ()) for suite in itself.suites)
    (apart,) = compare_runs([found[0][1], found[1][1]]).pairs
    assert any(suite.difference for suite in apart.suites)


def test_an_evaluation_that_is_not_there_is_told(workspace: Workspace) -> None:
    with pytest.raises(TenureError, match="no evaluation 'evals/far-1'"):
        workspace.scored("evals/far-1")
