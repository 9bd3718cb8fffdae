"""Task sequences as they are read and planned: what each run is asked to do, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_command import run_tenure
from tiny_sequence import EWC, REPLAY, TASKS, task, write_sequence

from training.errors import TenureError
from training.sequences.folder import SequenceFolder, find_sequence, is_sequence_id, new_sequence
from training.sequences.steps import Before, load_sequence, next_model, step_spec
from training.spec import RunSpec
from training.specfile import load_spec
from training.strategy import Ewc, Replay, Si
from training.workspace import Workspace, write_json

SI = {"type": "si", "strength": 1.0}
LORA = {"type": "lora", "rank": 4, "alpha": 8}


def steps(path: Path, importances: dict[str, Path] | None = None) -> list[RunSpec]:
    """The runs' specs, each going on from the model of the one before as if it stood in a folder of its name."""
    sequence = load_sequence(path)
    befores = [Before(sequence.model), *(Before(f"/{name}", importances or {}) for name in TASKS)]
    return [step_spec(sequence, index, befores[index]) for index in range(len(sequence.tasks))]


def files(replay: Replay | None) -> list[str]:
    return [source.path.name for source in replay.data] if replay else []


def test_every_run_goes_on_from_the_last_model_and_scores_every_suite(tmp_path: Path, tiny_model: Path) -> None:
    runs = steps(write_sequence(tmp_path, tiny_model))
    assert [run.name for run in runs] == ["tiny-sums", "tiny-differences", "tiny-products"]
    assert [run.model for run in runs] == [str(tiny_model), "/sums", "/differences"]
    assert [[suite.name for suite in run.suites.target] for run in runs] == [[name] for name in TASKS]
    assert all({suite.name for suite in run.suites.all} == {*TASKS, "sentences"} for run in runs)


def test_tasks_to_come_promise_nothing_and_may_be_left_out(tmp_path: Path, tiny_model: Path) -> None:
    tasks = [task("sums"), task("differences", "exact_match"), task("products")]
    first = steps(write_sequence(tmp_path, tiny_model, tasks))[0]
    assert {s.name: s.max_loss for s in first.suites.retention} == {
        "sentences": None,
        "differences": 1.0,
        "products": 1000.0,
    }
    runs = steps(write_sequence(tmp_path, tiny_model, score_ahead=False))
    assert [len(run.suites.retention) for run in runs] == [1, 2, 3]


def test_a_target_s_thresholds_hold_in_their_time(tmp_path: Path, tiny_model: Path) -> None:
    tasks = [task("sums"), task("differences")]
    tasks[0]["suites"]["target"][0] |= {"min_gain": 0.5, "max_loss": 0.3}
    first, second = steps(write_sequence(tmp_path, tiny_model, tasks))
    assert (first.suites.target[0].min_gain, first.suites.target[0].max_loss) == (0.5, None)
    kept = next(suite for suite in second.suites.retention if suite.name == "sums")
    assert (kept.min_gain, kept.max_loss) == (None, 0.3)


def test_replay_rows_are_those_of_earlier_tasks_alone(tmp_path: Path, tiny_model: Path) -> None:
    runs = steps(write_sequence(tmp_path, tiny_model, carry=[REPLAY]))
    assert [files(run.protection(Replay)) for run in runs] == [
        [],
        ["sums.jsonl"],
        ["sums.jsonl", "differences.jsonl"],
    ]
    given = REPLAY | {"data": [{"path": "sentences.jsonl", "text": "text"}]}
    runs = steps(write_sequence(tmp_path, tiny_model, carry=[given]))
    assert files(runs[0].protection(Replay)) == ["sentences.jsonl"]
    assert files(runs[2].protection(Replay)) == ["sentences.jsonl", "sums.jsonl", "differences.jsonl"]


def test_online_ewc_looks_at_the_last_task_and_adds_what_was_before(tmp_path: Path, tiny_model: Path) -> None:
    last = {"ewc": tmp_path / "last"}
    runs = steps(write_sequence(tmp_path, tiny_model, carry=[EWC | {"gamma": 0.9}]), last)
    pulls = [run.protection(Ewc) for run in runs]
    assert pulls[0] is None
    for pull, file in zip(pulls[1:], ("sums.jsonl", "differences.jsonl"), strict=True):
        assert pull is not None
        assert ([source.path.name for source in pull.data], pull.previous, pull.gamma) == ([file], last["ewc"], 0.9)
    given = EWC | {"data": [{"path": "sentences.jsonl", "text": "text"}]}
    first = steps(write_sequence(tmp_path, tiny_model, carry=[given]))[0].protection(Ewc)
    assert first is not None
    assert first.data[0].path.name == "sentences.jsonl"


def test_si_records_every_task_and_is_held_by_the_last_record(tmp_path: Path, tiny_model: Path) -> None:
    runs = steps(write_sequence(tmp_path, tiny_model, carry=[SI]), {"si": tmp_path / "record"})
    pulls = [run.protection(Si) for run in runs]
    assert [pull.importance if pull else "none" for pull in pulls] == [None, tmp_path / "record", tmp_path / "record"]
    assert all(pull and pull.record is True for pull in pulls)


def test_what_a_task_sets_is_laid_over_training_and_replaces_the_rest(tmp_path: Path, tiny_model: Path) -> None:
    own = {"training": {"learning_rate": 0.5}, "protections": [], "contract": {"min_gain": 0.2}}
    tasks = [task("sums"), task("differences", **own)]
    shared = [{"type": "l2sp", "strength": 1.0}]
    first, second = steps(write_sequence(tmp_path, tiny_model, tasks, protections=shared))
    assert (first.training.learning_rate, second.training.learning_rate) == (1e-3, 0.5)
    assert first.training.epochs == second.training.epochs == 3
    assert (len(first.protections), len(second.protections)) == (1, 0)
    assert (second.contract.min_gain, second.contract.max_loss) == (0.2, 0.02)


def test_an_adapter_is_merged_for_the_next_task(tmp_path: Path, tiny_model: Path) -> None:
    runs = steps(write_sequence(tmp_path, tiny_model, tuning=LORA))
    assert [run.export.merged for run in runs] == [True, True, False]
    assert next_model(Path("/a"), runs[0]) == Path("/a/merged")


def test_a_started_sequence_reads_as_it_was_given(tmp_path: Path, tiny_model: Path) -> None:
    tasks = [task("sums"), task("differences", training={"learning_rate": 0.5})]
    sequence = load_sequence(write_sequence(tmp_path, tiny_model, tasks, carry=[REPLAY, EWC]))
    folder = new_sequence(Workspace.at(tmp_path / "workspace"), "tiny")
    write_json(folder.spec, sequence.model_dump(mode="json", exclude_unset=True))
    assert folder.read_spec() == sequence
    assert step_spec(folder.read_spec(), 1, Before("/m")) == step_spec(sequence, 1, Before("/m"))


def test_an_id_names_one_run_or_one_sequence(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    workspace.new_run("tiny")
    folder = new_sequence(workspace, "tiny")
    assert folder.id == "tiny-2"
    assert is_sequence_id(workspace, "tiny-2")
    assert not is_sequence_id(workspace, "tiny-1")
    with pytest.raises(TenureError, match=r"there is no sequence 'tny-2'.*\n.*did you mean 'tiny-2'"):
        find_sequence(workspace, "tny-2")
    with pytest.raises(TenureError, match="sequence 'tiny-2' never started"):
        find_sequence(workspace, "tiny-2")
    assert SequenceFolder(tmp_path / "none").runs() == {}


# ---------------------------------------------------------------------------------------------------- faults

WISE = {"type": "wise", "alpha": 0.5}
PROMPT = {"type": "prompt_tuning"}
ALIEN = task("products")
ALIEN["suites"]["target"][0]["name"] = "sums"
BARE = {key: value for key, value in task("products").items() if key != "suites"}
EMPTY = task("products") | {"suites": {"target": []}}
PAIRS = task("sums") | {
    "objective": {"type": "dpo"},
    "data": {"train": [{"path": "sums.jsonl", "prompt": "question", "chosen": "answer", "rejected": "question"}]},
}


@pytest.mark.parametrize(
    ("tasks", "sections", "key", "what"),
    [
        ([task("sums"), task("sums")], {}, "tasks[1].name", "two tasks are called 'sums'"),
        ([task("sums"), BARE], {}, "tasks[1].suites", "this key is missing"),
        ([task("sums"), EMPTY], {}, "tasks[1].suites.target", "[] is not a list of 1 or more"),
        ([task("sums"), ALIEN], {}, "tasks[1].suites.target[0]", "two suites are called 'sums'"),
        ([task("sums")], {}, "tasks", "a sequence has two tasks or more, and here is one"),
        ([], {}, "tasks", "a sequence has two tasks or more, and here are none"),
        (
            [task("sums"), task("products", training={"learning_rat": 1})],
            {},
            "tasks[1].training.learning_rat",
            "unknown key 'learning_rat'",
        ),
        ([task("sums"), task("products", scaling={})], {}, "tasks[1].scaling", "unknown key 'scaling'"),
        (None, {"tuning": PROMPT}, "tuning", "the task after 'sums' goes on from whole weights, and prompt_tuning"),
        (
            [task("sums", tuning=PROMPT), task("products")],
            {},
            "tasks[0].tuning",
            "the task after 'sums' goes on from whole weights",
        ),
        (None, {"carry": [REPLAY, REPLAY]}, "carry[1]", "replay is carried twice"),
        (None, {"carry": [{"type": "kl"}]}, "carry[0]", "'kl' is not known here"),
        (
            None,
            {"carry": [REPLAY], "protections": [{"type": "replay", "generate": {}}]},
            "carry[0]",
            "replay is listed twice",
        ),
        (None, {"carry": [SI], "tuning": LORA}, "carry[0]", "si records the path of whole weights"),
        (None, {"carry": [SI], "protections": [WISE]}, "carry[0]", "si records the path to what task 'sums' tuned"),
        (
            [task("sums", tuning={"type": "partial", "parameters": ["*"]}), task("products")],
            {"carry": [SI]},
            "carry[0]",
            "si weighs the weights that moved, and the task after 'sums' moves others",
        ),
        ([PAIRS, task("products")], {"carry": [EWC]}, "carry[0]", "ewc looks at single answers, and task 'sums' has"),
        ([PAIRS, task("products")], {"carry": [REPLAY]}, "carry[0]", "rows of the form preference cannot be replayed"),
        (
            [task("sums", objective={"type": "lm"}), task("products")],
            {},
            "tasks[0].data.train[0]",
            "objective lm cannot learn from rows of the form completion",
        ),
        (
            [task("sums"), task("products", training={"global_batch_size": 7})],
            {"scaling": {"workers": 2}},
            "tasks[1].training.global_batch_size",
            "7 does not divide by 2 workers",
        ),
    ],
)
def test_bad_input_is_one_error(
    tmp_path: Path, tiny_model: Path, tasks: list[Any] | None, sections: dict[str, Any], key: str, what: str
) -> None:
    path = write_sequence(tmp_path, tiny_model, tasks, **sections)
    with pytest.raises(TenureError) as raised:
        load_sequence(path)
    (problem,) = raised.value.problems
    assert problem.where.split(": ")[1] == key
    assert problem.what.startswith(what)
    assert problem.instead


def test_faults_of_several_tasks_are_told_together(tmp_path: Path, tiny_model: Path) -> None:
    tasks = [task("sums", objective={"type": "lm"}), task("products", objective={"type": "dpo"})]
    with pytest.raises(TenureError) as raised:
        load_sequence(write_sequence(tmp_path, tiny_model, tasks))
    assert [problem.where.split(": ")[1] for problem in raised.value.problems] == [
        "tasks[0].data.train[0]",
        "tasks[1].data.train[0]",
    ]


def test_train_points_to_the_command_for_sequences(tmp_path: Path, tiny_model: Path) -> None:
    path = write_sequence(tmp_path, tiny_model)
    with pytest.raises(TenureError, match=r"tasks: tasks make this a sequence\n.*run: tenure sequence "):
        load_spec(path)


def test_check_plans_all_tasks_and_tells_faults_of_all_their_rows(tmp_path: Path, tiny_model: Path) -> None:
    path = write_sequence(tmp_path, tiny_model, carry=[REPLAY])
    done = run_tenure(tmp_path, "check", str(path))
    assert done.returncode == 0, done.stderr
    assert "sequence.yaml: 3 tasks" in " ".join(done.stdout.split())
    assert done.stdout.count("ZeRO stage") == 3
    assert done.stdout.count("\nreplay") == 2
    assert "all tasks  33 steps" in done.stdout  # 3 epochs of 24 rows: 9 steps, then of 8 - 2 new rows a batch: 12
    for name in ("differences", "products"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1"}\n')
    done = run_tenure(tmp_path, "check", str(path))
    assert done.returncode == 2
    assert "differences.jsonl" in done.stderr
    assert "products.jsonl" in done.stderr
    assert not (tmp_path / "workspace" / "runs").exists()
