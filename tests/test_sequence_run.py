"""Whole sequences by the command line: the chain of artifacts, the matrix, and a kill half-way."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import Command
from jobs import artifact_weights
from tiny_sequence import EWC, REPLAY, TASKS, task, write_sequence

from training.importance import read_info
from training.models import hash_folder
from training.scorecard import Scorecard, read_scorecard
from training.sequence_folder import SequenceFolder
from training.sequence_result import SequenceResult, read_result
from training.tracking import client, tracking_id_of
from training.transfer import summarise
from training.workspace import RunFolder, Workspace, read_json

CARRY = [REPLAY, EWC]
WAIT_S = 900.0  # several runs, one after the other


@dataclass(frozen=True)
class WholeSequence:
    """A sequence of the command line that has ended."""

    command: Command
    status: int
    workspace: Workspace
    folder: SequenceFolder

    @property
    def runs(self) -> list[RunFolder]:
        return [self.workspace.run(run) for run in self.folder.runs().values()]

    @property
    def cards(self) -> list[Scorecard]:
        return [read_scorecard(run.scorecard) for run in self.runs]

    @property
    def result(self) -> SequenceResult:
        result = read_result(self.folder.result)
        assert result is not None
        return result


def start(folder: Path, model: Path, names: list[str]) -> tuple[Command, Workspace, SequenceFolder]:
    path = write_sequence(folder, model, [task(name) for name in names], carry=CARRY)
    workspace = Workspace.at(folder / "workspace")
    command = Command.start("sequence", path, workspace=workspace.root)
    return command, workspace, SequenceFolder(workspace.root / "sequences" / "tiny-1")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeSequence:
    """Three tasks with replay and online EWC, not disturbed."""
    command, workspace, folder = start(tmp_path_factory.mktemp("whole"), tiny_model, list(TASKS))
    return WholeSequence(command, command.finish(WAIT_S), workspace, folder)


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeSequence:
    """Its first two tasks, killed (driver and all) in the second one and resumed."""
    first, workspace, folder = start(tmp_path_factory.mktemp("killed"), tiny_model, list(TASKS)[:2])
    first.wait_for(5, RunFolder(workspace.runs / "tiny-differences-1"))
    for process in first.survivors():
        process.send_signal(signal.SIGKILL)
    first.finish()
    command = Command.start("resume", "tiny-1", workspace=workspace.root)
    return WholeSequence(command, command.finish(WAIT_S), workspace, folder)


def test_each_run_goes_on_from_the_last_artifact(whole: WholeSequence, tiny_model: Path) -> None:
    assert whole.status == 0, whole.command.err
    assert whole.folder.runs() == {name: f"tiny-{name}-1" for name in TASKS}
    hashes = [hash_folder(tiny_model), *(hash_folder(run.artifact) for run in whole.runs)]
    assert [card.base_hash for card in whole.cards] == hashes[:-1]
    assert [card.artifact_hash for card in whole.cards] == hashes[1:]
    assert len(set(hashes)) == 4
    parents = [read_json(run.lineage).get("parent") for run in whole.runs]
    assert parents == [None, {"run": "tiny-sums-1"}, {"run": "tiny-differences-1"}]


def test_runs_are_registered_with_their_place_in_the_sequence(whole: WholeSequence) -> None:
    store = client(whole.workspace)
    tags = [store.get_run(tracking_id_of(run)).data.tags for run in whole.runs]
    assert [tag["lineage.sequence.task"] for tag in tags] == list(TASKS)
    assert [tag["lineage.sequence.id"] for tag in tags] == ["tiny-1"] * 3
    assert tags[1]["lineage.parent.run"] == "tiny-sums-1"
    assert all(run.registration.is_file() for run in whole.runs)


def test_importance_is_chained_over_tasks(whole: WholeSequence) -> None:
    """Online EWC: the second run is held by one task, the third by two, each computed on the last artifact."""
    infos = [read_info(folder) for folder in (whole.workspace.cache / "importance").iterdir() if folder.name != "ray"]
    found = {info.base_hash: info.tasks for info in infos}
    assert found == {hash_folder(run.artifact): count for run, count in zip(whole.runs[:2], (1, 2), strict=True)}
    specs = [read_json(run.spec)["protections"] for run in whole.runs]
    assert [[protection["type"] for protection in spec] for spec in specs] == [[], ["replay", "ewc"], ["replay", "ewc"]]
    assert (specs[1][1]["previous"], bool(specs[2][1]["previous"])) == (None, True)


def test_replayed_rows_come_from_earlier_tasks_only(whole: WholeSequence) -> None:
    replayed = [sorted(Path(file).name for file in read_json(run.lineage).get("replay", {})) for run in whole.runs]
    assert replayed == [[], ["sums.jsonl"], ["differences.jsonl", "sums.jsonl"]]


def test_the_matrix_holds_every_suite_after_every_task(whole: WholeSequence) -> None:
    result = whole.result
    assert [column.suite for column in result.columns] == [*TASKS, "sentences"]
    assert [row.task for row in result.rows] == [None, *TASKS]
    assert all(score is not None for row in result.rows for score in row.scores)
    for index, card in enumerate(whole.cards):
        before = {suite.name: suite.base for suite in card.suites}
        after = {suite.name: suite.tuned for suite in card.suites}
        for place, column in enumerate(result.columns):
            assert result.score(index, place) == before[column.suite]  # a run's base is the last run's model
            assert result.score(index + 1, place) == after[column.suite]


def test_the_figures_are_those_of_the_matrix(whole: WholeSequence) -> None:
    signed = [[-(score or 0.0) for score in row.scores[:3]] for row in whole.result.rows]
    wanted = summarise(signed[1:], signed[0])
    assert whole.result.figures is not None
    assert whole.result.figures.model_dump() == vars(wanted)
    assert list(whole.result.forgotten) == ["sums", "differences"]


def test_what_earlier_tasks_taught_is_marked_as_inherited(whole: WholeSequence) -> None:
    suites = read_json(whole.runs[2].spec)["suites"]["retention"]
    assert {suite["name"]: suite["inherited_from"] for suite in suites} == {
        "sentences": None,
        "sums": "tiny-sums-1",
        "differences": "tiny-differences-1",
    }


def test_the_screen_and_the_page_show_the_matrix(whole: WholeSequence) -> None:
    assert "task 3 of 3: products" in whole.command.out
    assert "backward transfer" in whole.command.out
    assert "Warning" not in whole.command.out + whole.command.err
    page = whole.folder.report.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")
    shown = Command.start("report", "tiny-1", "--json", workspace=whole.workspace.root)
    assert shown.finish() == 0, shown.err
    assert json.loads(shown.out) == read_json(whole.folder.result)


def test_a_killed_sequence_goes_on_to_the_same_artifacts(whole: WholeSequence, killed: WholeSequence) -> None:
    assert killed.status == 0, killed.command.err
    assert killed.folder.runs() == {name: f"tiny-{name}-1" for name in list(TASKS)[:2]}
    assert "run tiny-sums-1 is finished" in killed.command.out
    assert sorted(path.name for path in killed.workspace.runs.iterdir()) == ["tiny-differences-1", "tiny-sums-1"]
    for run, wanted in zip(killed.runs, whole.runs, strict=False):
        given, expected = artifact_weights(run.artifact), artifact_weights(wanted.artifact)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], expected[name]) for name in expected)
    resumed = [row for row in killed.runs[1].metrics.read_text().splitlines() if '"resume"' in row]
    assert len(resumed) == 1


def test_resuming_a_finished_sequence_does_nothing_again(whole: WholeSequence) -> None:
    before = [run.registration.read_bytes() for run in whole.runs]
    again = Command.start("resume", "tiny-1", workspace=whole.workspace.root)
    assert again.finish() == 0, again.err
    assert again.out.count("is finished") == 3
    assert [run.registration.read_bytes() for run in whole.runs] == before
