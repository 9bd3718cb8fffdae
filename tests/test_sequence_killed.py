"""A task sequence that is killed outright, and goes on through the real command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from commands import Command
from tiny_sequence import REPLAY, TASKS, task, write_sequence

from cluster.sequence import worst_verdict
from training.models import hash_folder
from training.sequences.folder import SequenceFolder
from training.sequences.result import read_result
from training.workspace import RunFolder, Workspace

STATUS = {"kept": 0, "broken": 3}
PATIENCE_S = 700.0


def test_a_killed_sequence_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL for the command and all that came of it, in the second task's steps: the first is not learned again."""
    first, second = list(TASKS)[:2]
    path = write_sequence(tmp_path, tiny_model, [task(first), task(second)], carry=[REPLAY])
    workspace = Workspace.at(tmp_path / "workspace")
    monkeypatch.setattr("commands.WAIT_S", PATIENCE_S)  # two runs, one after the other
    command = Command.start("sequence", path, workspace=workspace.root)
    try:
        command.wait_for(4, RunFolder(workspace.runs / f"tiny-{second}-1"))
        os.kill(command.process.pid, signal.SIGKILL)
        for process in command.survivors():
            process.kill()
        assert command.process.wait(60) == -signal.SIGKILL
    finally:
        command.end()
    learned = RunFolder(workspace.runs / f"tiny-{first}-1")
    before = hash_folder(learned.artifact), learned.scorecard.stat().st_mtime_ns, learned.metrics.read_bytes()

    resumed = Command.start("resume", "tiny-1", workspace=workspace.root)
    status = resumed.finish(PATIENCE_S)
    assert (hash_folder(learned.artifact), learned.scorecard.stat().st_mtime_ns, learned.metrics.read_bytes()) == before
    folder = SequenceFolder(workspace.root / "sequences" / "tiny-1")
    assert folder.runs() == {first: f"tiny-{first}-1", second: f"tiny-{second}-1"}
    assert sorted(run.name for run in workspace.runs.iterdir()) == sorted(folder.runs().values())
    rows = [
        json.loads(line) for line in RunFolder(workspace.runs / f"tiny-{second}-1").metrics.read_text().splitlines()
    ]
    (went_on,) = [row["step"] for row in rows if row["kind"] == "resume"]
    assert went_on >= 2  # a checkpoint every two steps
    result = read_result(folder.result)
    assert result is not None
    assert status == STATUS[worst_verdict(result)], resumed.err
    assert [row.task for row in result.rows] == [None, first, second]
    assert result.figures is not None
    assert result.figures.backward_transfer is not None
