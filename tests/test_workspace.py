"""The workspace: fresh run folders, runs by name, files that are never half written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from training.errors import TenureError
from training.workspace import Workspace, read_json, write_json


def test_runs_are_numbered_by_name(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    assert [workspace.new_run(name).id for name in ("a", "a", "b", "a-1", "a")] == ["a-1", "a-2", "b-1", "a-1-1", "a-3"]


def test_a_removed_run_is_not_replaced_while_a_later_one_stands(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    first, _ = workspace.new_run("a"), workspace.new_run("a")
    first.path.rmdir()
    assert workspace.new_run("a").id == "a-3"


def test_runs_that_start_at_once_never_share_a_folder(tmp_path: Path) -> None:
    workspace, racers = Workspace.at(tmp_path), 16
    barrier = Barrier(racers)

    def start(_: int) -> str:
        barrier.wait()
        return workspace.new_run("a").id

    with ThreadPoolExecutor(racers) as pool:
        ids = list(pool.map(start, range(racers)))
    assert sorted(ids) == sorted(f"a-{number}" for number in range(1, racers + 1))


def test_an_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    with pytest.raises(TenureError) as caught:
        workspace.run("demo-1")
    assert caught.value.problems[0].instead == "tenure runs lists the runs there are"
    run = workspace.new_run("demo")
    assert workspace.run("demo-1") == run
    for near in ("demo-2", "dmo-1", "demo"):
        with pytest.raises(TenureError, match=f"there is no run '{near}' in ") as caught:
            workspace.run(near)
        assert caught.value.problems[0].instead == "did you mean 'demo-1'?"


@pytest.mark.parametrize("name", ["..", ".", "", "a/../a-1", "../runs/a-1"])
def test_a_run_is_a_name_and_no_path(tmp_path: Path, name: str) -> None:
    workspace = Workspace.at(tmp_path)
    workspace.new_run("a")
    with pytest.raises(TenureError, match="there is no run"):
        workspace.run(name)


def test_the_workspace_is_given_or_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENURE_WORKSPACE", raising=False)
    assert Workspace.at().root == tmp_path / "workspace"
    monkeypatch.setenv("TENURE_WORKSPACE", "elsewhere")
    assert Workspace.at().root == tmp_path / "elsewhere"
    assert Workspace.at("here").root == tmp_path / "here"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "value.json"
    write_json(path, {"text": "é", "number": 1.5})
    assert read_json(path) == {"text": "é", "number": 1.5}
    for wrong in ({"loss": float("nan")}, {"what": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, wrong)
        assert json.loads(path.read_text()) == {"text": "é", "number": 1.5}
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = Workspace(tmp_path).new_run("mine")
    with run.held(), pytest.raises(TenureError, match="another process is working on run 'mine-1'"), run.held():
        pass
    with run.held():
        pass
