"""Whole sequences: the chain of artifacts, the matrix, and an interruption half-way.

Workers and scoring processes are this process, so that the runs take seconds; all else is what the command does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from jobs import artifact_weights
from safetensors.torch import load_file
from tiny_sequence import EWC, REPLAY, TASKS, task, write_sequence

from cluster.cli import cli
from cluster.sequence import open_contracts, report_sequence, resume_sequence, train_sequence, worst_verdict
from training.errors import TenureError
from training.evaluation.scorecard import Scorecard, State, read_scorecard
from training.evaluation.transfer import summarise
from training.mlflow_store import client
from training.models import hash_folder
from training.protection.importance import IMPORTANCE_FOLDER, TENSORS_FILE, read_info
from training.sequences.folder import SequenceFolder
from training.sequences.result import SequenceResult, read_result
from training.spec import RunSpec
from training.strategy import Si
from training.tracking import tracking_id_of
from training.worker import Trainer
from training.workspace import RunFolder, Workspace, read_json

CARRY = [REPLAY, EWC]
INTERRUPTED = 130


@dataclass(frozen=True)
class WholeSequence:
    """A sequence that has ended."""

    workspace: Workspace
    folder: SequenceFolder
    verdict: State

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


@pytest.fixture(scope="module")
def here(one_process: None) -> Iterator[pytest.MonkeyPatch]:
    """Workers, scoring and Ray's session are this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.fit.run_workers", lambda function, config, *_: function(config))
        patch.setattr("training.evaluation.spread.num_places", lambda *_: 1)
        for module in ("training.evaluation.spread", "training.aids"):
            patch.setattr(f"{module}.run_tasks", lambda compute, jobs, *_: [compute(job) for job in jobs])
        patch.setattr("cluster.pipeline.ray_session", lambda *_: nullcontext())
        yield patch


def spec_of(folder: Path, model: Path, names: list[str], **sections: Any) -> tuple[Path, Workspace, SequenceFolder]:
    path = write_sequence(folder, model, [task(name) for name in names], **{"carry": CARRY, **sections})
    workspace = Workspace.at(folder / "workspace")
    return path, workspace, SequenceFolder(workspace.root / "sequences" / "tiny-1")


@pytest.fixture(scope="module")
def whole(here: pytest.MonkeyPatch, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeSequence:
    """Three tasks with replay and online EWC, not disturbed."""
    path, workspace, folder = spec_of(tmp_path_factory.mktemp("whole"), tiny_model, list(TASKS))
    return WholeSequence(workspace, folder, train_sequence(path, workspace, None))


@pytest.fixture(scope="module")
def interrupted(here: pytest.MonkeyPatch, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeSequence:
    """Its first two tasks, interrupted in the second one's fourth step and resumed."""
    path, workspace, folder = spec_of(tmp_path_factory.mktemp("killed"), tiny_model, list(TASKS)[:2])
    train_step = Trainer.train_step

    def stop_there(trainer: Trainer) -> None:
        if trainer.folder.id == "tiny-differences-1" and trainer.step == 3:
            raise KeyboardInterrupt
        train_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_there)
        with pytest.raises(SystemExit) as left:
            train_sequence(path, workspace, None)
    assert left.value.code == INTERRUPTED
    return WholeSequence(workspace, folder, resume_sequence("tiny-1", workspace, None, rescaled=False))


def test_each_run_goes_on_from_the_last_artifact(whole: WholeSequence, tiny_model: Path) -> None:
    assert (whole.verdict == "kept") is all(card.contract.verdict == "kept" for card in whole.cards)
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


def test_the_page_and_the_command_show_the_matrix(whole: WholeSequence, capfd: pytest.CaptureFixture[str]) -> None:
    page = whole.folder.report.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    report_sequence("tiny-1", whole.workspace, as_json=True)
    assert json.loads(capfd.readouterr().out) == read_json(whole.folder.result)
    report_sequence("tiny-1", whole.workspace, as_json=False)
    assert "backward transfer" in capfd.readouterr().out


def test_an_interrupted_sequence_goes_on_to_the_same_artifacts(
    whole: WholeSequence, interrupted: WholeSequence
) -> None:
    assert interrupted.folder.runs() == {name: f"tiny-{name}-1" for name in list(TASKS)[:2]}
    assert sorted(path.name for path in interrupted.workspace.runs.iterdir()) == ["tiny-differences-1", "tiny-sums-1"]
    for run, wanted in zip(interrupted.runs, whole.runs, strict=False):
        given, expected = artifact_weights(run.artifact), artifact_weights(wanted.artifact)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], expected[name]) for name in expected)
    rows = [json.loads(line) for line in interrupted.runs[1].metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "resume"] == [2]  # the last whole checkpoint
    assert not [row for row in interrupted.runs[0].metrics.read_text().splitlines() if '"resume"' in row]


def test_resuming_a_finished_sequence_does_nothing_again(whole: WholeSequence) -> None:
    before = [(run.registration.read_bytes(), run.scorecard.stat().st_mtime_ns) for run in whole.runs]
    assert resume_sequence("tiny-1", whole.workspace, None, rescaled=False) == whole.verdict
    assert [(run.registration.read_bytes(), run.scorecard.stat().st_mtime_ns) for run in whole.runs] == before


def test_another_scale_is_for_a_run(whole: WholeSequence) -> None:
    with pytest.raises(TenureError, match=r"another scale is for one run\n.*tenure resume tiny-products-1 with it"):
        resume_sequence("tiny-1", whole.workspace, None, rescaled=True)


def test_an_adapter_goes_on_from_its_merged_model(here: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    lora = {"type": "lora", "rank": 4, "alpha": 8}
    path, workspace, folder = spec_of(tmp_path, tiny_model, list(TASKS)[:2], tuning=lora)
    done = WholeSequence(workspace, folder, train_sequence(path, workspace, None))
    first, second = done.runs
    assert done.cards[1].base_hash == hash_folder(first.artifact / "merged")
    assert read_json(second.lineage)["parent"] == {"run": first.id}
    assert not (second.artifact / "merged").exists()
    for before, after in zip(done.cards[0].suites, done.cards[1].suites, strict=True):
        scores = {suite.name: suite.base for suite in done.cards[1].suites}
        assert scores[before.name] == pytest.approx(before.tuned, rel=1e-3), after.name


def test_si_holds_a_task_to_what_the_one_before_recorded(
    here: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    """Weighted by the first task's record, the weights stay the nearer to where it left them, the stronger SI is."""
    drifts = {}
    for strength in (1e-6, 1e3):
        carry = [{"type": "si", "strength": strength}]
        path, workspace, folder = spec_of(tmp_path / f"{strength}", tiny_model, list(TASKS)[:2], carry=carry)
        done = WholeSequence(workspace, folder, train_sequence(path, workspace, None))
        first, second = done.runs
        held = RunSpec.model_validate(read_json(second.spec)).protection(Si)
        assert held is not None
        assert held.importance == first.artifact / IMPORTANCE_FOLDER
        record = load_file(held.importance / TENSORS_FILE)
        assert (second.artifact / IMPORTANCE_FOLDER / TENSORS_FILE).is_file()
        before, after = (artifact_weights(run.artifact) for run in done.runs)
        parts = [(weight.clamp(min=0), after[name] - before[name]) for name, weight in record.items()]
        drifts[strength] = sum(float((weight * moved**2).sum()) for weight, moved in parts)
    assert 0 < drifts[1e3] < 0.5 * drifts[1e-6]


def test_an_undecided_contract_is_told_and_has_a_status_of_its_own(
    whole: WholeSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = whole.result.rows
    kept, last = (
        row.model_copy(update={"contract": how}) for row, how in zip(rows[1:], ("kept", "undecided"), strict=False)
    )
    undecided = whole.result.model_copy(update={"rows": (rows[0], kept, last)})
    broken = undecided.model_copy(update={"rows": (*undecided.rows, rows[1].model_copy(update={"contract": "broken"}))})
    assert worst_verdict(undecided) == "undecided"
    assert worst_verdict(broken) == "broken"
    told = [f"the contract of differences is undecided: too few items to tell; see tenure report {rows[2].run}"]
    assert open_contracts(undecided) == told
    for verdict, status in (("kept", 0), ("undecided", 4), ("broken", 3)):
        monkeypatch.setattr("cluster.sequence.train_sequence", lambda *_, verdict=verdict: verdict)
        monkeypatch.setattr("cluster.sequence.resume_sequence", lambda *_, verdict=verdict, **__: verdict)
        for arguments in (["sequence", "any.yaml"], ["resume", "tiny-1"]):
            done = CliRunner().invoke(cli, ["--workspace", str(whole.workspace.root), *arguments])
            assert done.exit_code == status
