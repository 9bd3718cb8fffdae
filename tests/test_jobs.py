"""What a submitted job takes with it, what it does on the cluster, and what is refused before anything is sent."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tiny_spec import write_tiny_spec

from cluster import entry, jobs, submit
from cluster.cli import cli
from cluster.packing import JOB_FILE, pack, references
from cluster.session import imported, needs, ray_session
from training.errors import TenureError
from training.spec import Scaling
from training.workspace import Workspace, read_json, write_json

SHARED = "/shared/tenure"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_tiny_spec(tmp_path / "mine", Path("/models/tiny"))


def amend(spec: Path, **sections: Any) -> Path:
    spec.write_text(yaml.safe_dump({**yaml.safe_load(spec.read_text()), **sections}), encoding="utf-8")
    return spec


def packed_at(spec: Path, target: Path, run_id: str = "tiny-1") -> Path:
    pack("train", str(spec), run_id, spec, target)
    return target


def test_a_job_takes_the_spec_its_files_and_the_code(spec: Path, tmp_path: Path) -> None:
    job = packed_at(spec, tmp_path / "job")
    files = sorted(str(file.relative_to(job / "files")) for file in (job / "files").rglob("*"))
    assert files == ["sentences.jsonl", "spec.yaml", "sums.jsonl", "train.jsonl"]
    assert read_json(job / JOB_FILE) == {"id": "tiny-1", "command": "train", "subject": "files/spec.yaml"}
    assert (job / "cluster" / "entry.py").is_file()
    assert list(job.rglob("__pycache__")) == []


def test_files_beside_the_specs_folder_keep_their_places(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(2):
        shutil.copy(spec.parent / "train.jsonl", tmp_path / "rows" / f"part-{number}.jsonl")
    source = {"path": "../rows/part-*.jsonl", "prompt": "question", "completion": "answer"}
    amend(spec, data={"train": [source]}, suites={"target": [], "retention": []})
    job = packed_at(spec, tmp_path / "job")
    assert read_json(job / JOB_FILE)["subject"] == "files/mine/spec.yaml"
    assert sorted(path.name for path in (job / "files" / "rows").iterdir()) == ["part-0.jsonl", "part-1.jsonl"]


def test_absolute_paths_and_urls_stay_where_they_are(spec: Path) -> None:
    far = [{"path": path, "prompt": "q", "completion": "a"} for path in ("/shared/rows.jsonl", "s3://bucket/x.jsonl")]
    files, shared = references(amend(spec, data={"train": far}))
    assert sorted(file.name for file in files) == ["sentences.jsonl", "spec.yaml", "sums.jsonl"]
    assert sorted(shared) == ["/models/tiny", "/shared/rows.jsonl", "s3://bucket/x.jsonl"]


def test_a_sweep_takes_its_base_with_it(spec: Path) -> None:
    sweep = spec.parent / "sweep.yaml"
    sweep.write_text("base: spec.yaml\n", encoding="utf-8")
    names = [file.name for file in references(sweep)[0]]
    assert names == ["sweep.yaml", "spec.yaml", "train.jsonl", "sums.jsonl", "sentences.jsonl"]


def test_five_gigabytes_are_refused_by_name(spec: Path, tmp_path: Path) -> None:
    with (spec.parent / "train.jsonl").open("r+b") as stream:
        stream.truncate(5 * 2**30)  # sparse: it takes no disk
    with pytest.raises(TenureError) as caught:
        pack("train", str(spec), "tiny-1", spec, tmp_path / "job")
    told = str(caught.value)
    assert "train.jsonl: 5.0 GiB, and a job takes 100 MiB with it" in told
    assert "absolute path or URL" in told
    assert not (tmp_path / "job").exists()


def test_many_files_that_are_too_large_together_are_refused(spec: Path, tmp_path: Path) -> None:
    for name, size in (("train", 60), ("sums", 50)):
        with (spec.parent / f"{name}.jsonl").open("r+b") as stream:
            stream.truncate(size * 2**20)
    with pytest.raises(TenureError, match=r"train\.jsonl: 4 files of 110 MiB in all"):
        pack("train", str(spec), "tiny-1", spec, tmp_path / "job")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


def test_a_job_is_kept_in_the_workspace_and_begins_once(spec: Path, workspace: Workspace, tmp_path: Path) -> None:
    job = packed_at(spec, tmp_path / "job")
    kept = entry.keep(job, workspace, "tiny-1")
    assert kept == workspace.root / "jobs" / "tiny-1"
    assert entry.keep(job, workspace, "tiny-1") == kept, "submitted again"
    assert entry.keep(tmp_path, workspace, "tiny-1") == kept, "taken up by a cluster that was given no folder"
    begin = ["train", str(kept / "files" / "spec.yaml"), "--id", "tiny-1"]
    assert entry.command_line(kept, workspace, "tiny-1") == begin
    write_json(workspace.runs / "tiny-1" / "spec.json", {})
    assert entry.command_line(kept, workspace, "tiny-1") == ["resume", "tiny-1"]


@pytest.mark.parametrize(
    ("command", "mark", "begun"),
    [
        ("sequence", "sequences/x/sequence.json", ["resume", "x"]),
        ("sweep", "sweeps/x/sweep.json", ["sweep", "--resume", "x"]),
        ("serve", "runs/far/spec.json", ["serve", "far"]),
        ("eval", "evals/x/scored.json", ["eval", "SPEC", "--of", "far", "--id", "x"]),
    ],
)
def test_every_command_goes_on_with_what_it_began(
    workspace: Workspace, command: str, mark: str, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace.root / "jobs" / "x"
    subject = "far" if command == "serve" else "files/spec.yaml"
    write_json(folder / JOB_FILE, {"id": "x", "command": command, "subject": subject, "of": "far"})
    write_json(workspace.root / mark, {})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    wanted = [str(folder / subject) if word == "SPEC" else word for word in begun]
    assert entry.command_line(folder, workspace, "x") == [*wanted, "--address", "10.0.0.2:6379"]


def test_an_id_is_not_shared_by_two_jobs(spec: Path, workspace: Workspace, tmp_path: Path) -> None:
    entry.keep(packed_at(spec, tmp_path / "job"), workspace, "tiny-1")
    other = packed_at(amend(spec, name="other"), tmp_path / "other")
    with pytest.raises(TenureError, match="the id 'tiny-1' is taken"):
        entry.keep(other, workspace, "tiny-1")


def test_an_id_of_a_run_that_was_not_submitted_is_taken(spec: Path, workspace: Workspace, tmp_path: Path) -> None:
    write_json(workspace.runs / "tiny-1" / "spec.json", {})
    with pytest.raises(TenureError, match="the id 'tiny-1' is taken"):
        entry.keep(packed_at(spec, tmp_path / "job"), workspace, "tiny-1")


def test_what_was_never_submitted_is_not_taken_up(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(TenureError, match="no job 'tiny-9' was kept"):
        entry.keep(tmp_path, workspace, "tiny-9")


def test_a_driver_that_is_killed_starts_again_and_one_that_is_stopped_does_not(
    spec: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(packed_at(spec, tmp_path / "job"))
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for ends, status in (([-9, -11, 3], 3), ([-15], 143), ([2], 2), ([-9] * 4, 137)):
        left = iter(ends)
        monkeypatch.setattr(entry, "_run", lambda *_, left=left: next(left))
        assert entry.main(str(workspace.root), "tiny-1") == status
        assert list(left) == []
    assert waits == [5, 10, 5, 10, 20]


def test_another_python_at_the_head_is_refused(
    spec: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(packed_at(spec, tmp_path / "job"))
    monkeypatch.setattr("sys.version_info", (3, 13, 1))
    with pytest.raises(TenureError, match=r"the cluster runs Python 3\.13\.1"):
        entry.main(str(workspace.root), "tiny-1")
    assert not workspace.root.exists()


class Answer(BaseHTTPRequestHandler):
    """A head of another Ray."""

    def do_GET(self) -> None:
        body = json.dumps({"version": "4", "ray_version": "2.40.0", "ray_commit": "x"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def other_ray() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_another_ray_at_the_head_is_refused(spec: Path, other_ray: str) -> None:
    with pytest.raises(TenureError, match=r"the cluster runs Ray 2\.40\.0"):
        submit("train", spec, address=other_ray, workspace=SHARED)


@pytest.mark.parametrize(
    ("version", "taken"), [("2.58.1", True), ("2.60.0", True), ("2.57.0", False), ("2.61.0", False), ("", False)]
)
def test_the_versions_of_ray_that_are_taken(version: str, taken: bool) -> None:
    if taken:
        jobs.check_version(version, "head")
    else:
        with pytest.raises(TenureError, match="use Ray"):
            jobs.check_version(version, "head")


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "head:port", "http://head:99999"])
def test_what_is_no_address_of_a_dashboard_is_told(spec: Path, address: str) -> None:
    with pytest.raises(TenureError, match="no address of a dashboard"):
        submit("train", spec, address=address, workspace=SHARED)


def test_an_address_that_nobody_answers_at_is_told(spec: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(TenureError, match="nobody answers at"):
            submit("train", spec, address=f"http://127.0.0.1:{closed.getsockname()[1]}", workspace=SHARED)


def test_faults_of_the_spec_and_of_the_place_come_before_the_cluster(spec: Path) -> None:
    nowhere = {"address": "http://127.0.0.1:1"}
    with pytest.raises(TenureError, match="no absolute path"):
        submit("train", spec, workspace="here", **nowhere)
    with pytest.raises(TenureError, match="is no id"):
        submit("train", spec, workspace=SHARED, run_id="../x", **nowhere)
    amend(spec, tunning={"type": "lora"})
    with pytest.raises(TenureError, match="unknown key 'tunning'"):
        submit("train", spec, workspace=SHARED, **nowhere)


def test_an_evaluation_takes_the_name_of_what_it_scores(spec: Path, tmp_path: Path) -> None:
    pack("eval", str(spec), "tiny-1", spec, tmp_path / "job", "far")
    wanted = {"id": "tiny-1", "command": "eval", "subject": "files/spec.yaml", "of": "far"}
    assert read_json(tmp_path / "job" / JOB_FILE) == wanted


@pytest.mark.parametrize(
    ("command", "of", "told"),
    [
        ("eval", None, "an evaluation scores an artifact"),
        ("eval", "mine/artifact", "'mine/artifact' is no absolute path"),
        ("train", "far", "train scores no artifact"),
    ],
)
def test_what_an_evaluation_scores_is_looked_at_first(spec: Path, command: Any, of: str | None, told: str) -> None:
    with pytest.raises(TenureError, match=told):
        submit(command, spec, address="http://127.0.0.1:1", workspace=SHARED, of=of)


def test_the_clusters_workspace_must_be_named(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENURE_WORKSPACE", raising=False)
    ended = CliRunner().invoke(cli, ["submit", "train", str(spec), "--address", "http://127.0.0.1:1"])
    assert ended.exit_code == 2
    assert "say where runs lie on the cluster" in ended.output


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), RuntimeError("no")])
def test_a_ray_that_does_not_come_up_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuses(**_: Any) -> None:
        raise error

    ended = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuses)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(error))  # the other tests' Ray stays
    with (
        pytest.raises(TenureError, match=f"could not connect: {error}"),
        ray_session(None, {}, tmp_path / "ray.log"),
    ):
        pass
    assert ended == [error]  # what came up half is gone


def test_more_gpus_than_there_are_is_told_with_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    wanted = needs(Scaling(workers=8, gpus_per_worker=1))
    with pytest.raises(TenureError) as caught, ray_session(None, wanted, tmp_path / "ray.log"):
        pass
    (problem,) = caught.value.problems
    assert (problem.what, problem.where) == ("the run wants 8 GPU, the cluster has 2", "scaling")
    assert "lower scaling.workers" in problem.instead


def test_what_a_run_needs_is_imported_when_ray_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.2)\ndone = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with imported(["slow_to_import"]):
        pass
    assert sys.modules["slow_to_import"].done
