"""Bad input to the real command: one clear error a fault, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_command import run_tenure
from probing import free_port
from tiny_spec import write_rows, write_tiny_spec

from training.workspace import Workspace


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The errors that a refused command told, each with what to do instead."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout == ""
    first, *told = ("\n" + done.stderr).split("\nerror: ")
    assert not first.strip()
    return [error.strip() for error in told]


def refused(folder: Path, *arguments: str, workspace: Path | None = None) -> list[str]:
    """The errors of a command that must leave no run behind."""
    done = run_tenure(folder, *arguments, workspace=workspace)
    runs = (workspace or folder / "workspace") / "runs"
    assert not runs.exists()
    return errors(done)


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> Path:
    return write_tiny_spec(tmp_path, tiny_model)


Edit = Callable[[dict[str, Any], Path], None]


def edited(spec: Path, edit: Edit) -> None:
    """Change a spec, or the files beside it."""
    data = yaml.safe_load(spec.read_text())
    edit(data, spec.parent)
    spec.write_text(yaml.safe_dump(data, sort_keys=False))


def several_faults(data: dict[str, Any], folder: Path) -> None:
    data["tuning"]["rnak"] = 4
    data["training"]["learning_rate"] = "fast"
    data["model"] = "smollm2-135m-instruct"
    data["data"]["train"][0]["path"] = "nowhere.jsonl"
    data["suites"]["target"][0]["path"] = "empty.jsonl"
    (folder / "empty.jsonl").touch()


def test_every_fault_of_a_spec_is_one_error(spec: Path) -> None:
    edited(spec, several_faults)
    told = refused(spec.parent, "train", "spec.yaml")
    assert [error.splitlines()[0] for error in told] == [
        "spec.yaml:2: model: the packaged model 'smollm2-135m-instruct' has not been fetched",
        "spec.yaml:7: tuning.rnak: unknown key 'rnak'",
        f"spec.yaml:12: data.train[0].path: there is no file {spec.parent / 'nowhere.jsonl'}",
        f"spec.yaml:18: suites.target[0].path: the file {spec.parent / 'empty.jsonl'} is empty",
        "spec.yaml:29: training.learning_rate: 'fast' is not a number above 0",
    ]
    assert told[0].splitlines()[1] == "    -> run: tenure fetch"
    assert told[1].splitlines()[1].startswith("    -> did you mean 'rank'? ")


def bad_rows(data: dict[str, Any], folder: Path) -> None:
    rows = ['{"question": "1+1", "answer": "2"}', '{"question": "1+2" "answer"}', '{"question": "1+3", "answer": ""}']
    (folder / "train.jsonl").write_text("\n".join(rows))
    write_rows(folder / "sums.jsonl", [{"question": "1+1", "reply": "2"}])


def test_every_bad_row_is_one_error(spec: Path) -> None:
    edited(spec, bad_rows)
    told = [error.splitlines()[0] for error in refused(spec.parent, "train", "spec.yaml")]
    assert told == [
        f"{spec.parent / 'train.jsonl'} row 2: not valid JSON: Expecting ',' delimiter at column 20",
        f"{spec.parent / 'train.jsonl'} row 3: 'answer' is empty: there is no target token to learn or score",
        f"{spec.parent / 'sums.jsonl'} row 1: there is no column 'answer'",
    ]


def unknown_model(data: dict[str, Any], folder: Path) -> None:
    data["model"] = "some/model"


def messages_without_template(data: dict[str, Any], folder: Path) -> None:
    shutil.copytree(data["model"], folder / "bare")
    (folder / "bare" / "chat_template.jinja").unlink()
    data["model"] = str(folder / "bare")
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    write_rows(folder / "train.jsonl", [{"turns": turns}])
    data["data"]["train"] = [{"path": "train.jsonl", "messages": "turns"}]


def other_teacher(data: dict[str, Any], folder: Path) -> None:
    """A teacher whose tokenizer has swapped two tokens."""
    shutil.copytree(data["model"], folder / "teacher")
    file = folder / "teacher" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    data["objective"] = {"type": "distill", "teacher": str(folder / "teacher")}


def missing_teacher(data: dict[str, Any], folder: Path) -> None:
    data["objective"] = {"type": "distill", "teacher": "./nowhere"}


def pairs_alike(data: dict[str, Any], folder: Path) -> None:
    data["objective"] = {"type": "dpo"}
    data["data"]["train"] = [{"path": "train.jsonl", "prompt": "question", "chosen": "answer", "rejected": "answer"}]
    write_rows(folder / "train.jsonl", [{"question": "1+1", "answer": "2"}])


def pairs_for_sft(data: dict[str, Any], folder: Path) -> None:
    data["data"]["train"] = [{"path": "train.jsonl", "prompt": "question", "chosen": "answer", "rejected": "question"}]


def too_large(data: dict[str, Any], folder: Path) -> None:
    """A model whose config says a hidden size that no memory holds."""
    shutil.copytree(data["model"], folder / "large")
    config = json.loads((folder / "large" / "config.json").read_text())
    (folder / "large" / "config.json").write_text(json.dumps(config | {"hidden_size": 10**9}))
    data["model"] = str(folder / "large")


def too_long(data: dict[str, Any], folder: Path) -> None:
    data["training"]["max_length"] = 31


def no_spec(data: dict[str, Any], folder: Path) -> None:
    (folder / "spec.yaml").rename(folder / "moved.yaml")


@pytest.mark.parametrize(
    ("edit", "what", "instead"),
    [
        (
            unknown_model,
            "spec.yaml:2: model: model 'some/model' is not on disk and no hub gave it",
            "give a local folder",
        ),
        (messages_without_template, "chat is asked for, but the model has no chat template", "use an instruct model"),
        (
            other_teacher,
            "objective.teacher: the teacher's tokens are not the model's: id 64 is 'a' in the model and 'b' in the "
            "teacher (259 and 259 tokens)",
            "take a teacher of the model's own family",
        ),
        (missing_teacher, "objective.teacher: there is no folder /", "give the folder of a saved model"),
        (pairs_alike, "row 1: the chosen and the rejected answer are the same", "remove the row"),
        (pairs_for_sft, "objective sft cannot learn from rows of the form preference", "give completion or messages"),
        (
            too_large,
            "scaling: a worker needs about ",
            "try training.micro_batch_size below 8, training.gradient_checkpointing: true, a smaller",
        ),
        (
            too_long,
            "row 1: 48 rows are longer than max_length 31",
            "set training.max_length: 33, or data.overlong: drop",
        ),
    ],
)
def test_a_run_that_cannot_start_is_one_error(spec: Path, edit: Edit, what: str, instead: str) -> None:
    edited(spec, edit)
    (told,) = refused(spec.parent, "train", "spec.yaml")
    assert what in told
    assert f"-> {instead}" in told


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_missing_and_an_empty_spec_are_refused(tmp_path: Path, command: str) -> None:
    assert refused(tmp_path, command, "none.yaml")[0].startswith("none.yaml: there is no such file")
    (tmp_path / "empty.yaml").touch()
    assert refused(tmp_path, command, "empty.yaml")[0].startswith("empty.yaml: the file is empty")


def test_a_ray_head_that_does_not_answer_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (told,) = refused(tmp_path, "train", "none.yaml", "--address", "127.0.0.1:1")
    assert told.startswith("--address: no Ray head answers at 127.0.0.1:1: Connection refused")
    (told,) = refused(tmp_path, "train", "none.yaml", "--address", "nowhere")
    assert told.startswith("--address: 'nowhere' is no address")


def with_small_disk(folder: Path, filled: bool) -> list[str]:
    """A command that runs its arguments with eight MiB of disk, in a mount namespace that ends with them, at a folder.

    Its status is 99 when they leave a run there.
    """
    leave = 'test ! -e "$0/runs" || exit 99; exit $status'
    for unshare in (["unshare", "-rm"], ["unshare", "-m"]):
        trial = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            fill = 'head -c 9m /dev/zero > "$0/filler" 2> /dev/null;' if filled else ""
            script = f'mount -t tmpfs -o size=8m tmpfs "$0"; {fill} "$@"; status=$?; {leave}'
            return [*unshare, "sh", "-c", script, str(folder)]
    pytest.skip("this user may not mount a file system, even in a namespace")


@pytest.mark.parametrize(
    ("filled", "what", "instead"),
    [
        (False, "the run needs 0.3 GiB of disk and 0.0 GiB are free", "free some space"),
        (True, "the encoded data cannot be written: No space left on device", "free some space"),
    ],
    ids=["small", "full"],
)
def test_a_disk_without_room_is_told_before_the_run_starts(spec: Path, filled: bool, what: str, instead: str) -> None:
    disk = spec.parent / "disk"
    disk.mkdir()
    (told,) = errors(
        run_tenure(spec.parent, "train", "spec.yaml", workspace=disk, within=with_small_disk(disk, filled))
    )
    assert what in told
    assert f"-> {instead}" in told


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (told,) = refused(tmp_path, "runs", workspace=tmp_path / "file")
    assert told.startswith(f"--workspace: {tmp_path / 'file'} is no folder")


@pytest.fixture
def unscored(tmp_path: Path) -> Path:
    """A folder whose workspace holds one run that did not end."""
    assert Workspace.at(tmp_path / "workspace").new_run("demo").id == "demo-1"
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [("report", "demo-2"), ("compare", "demo-1x", "demo-1"), ("resume", "demo"), ("serve", "dmo-1")]
)
def test_an_unknown_run_names_the_nearest(unscored: Path, arguments: tuple[str, ...]) -> None:
    (told,) = errors(run_tenure(unscored, *arguments))
    assert told == f"there is no run '{arguments[1]}' in {unscored / 'workspace'}\n    -> did you mean 'demo-1'?"


def test_a_run_that_did_not_end_has_no_report(unscored: Path) -> None:
    (told,) = errors(run_tenure(unscored, "report", "demo-1"))
    assert "run 'demo-1' has no scorecard" in told
    assert "tenure resume demo-1" in told


def test_a_port_in_use_is_told_before_anything_is_read(unscored: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (told,) = errors(run_tenure(unscored, "serve", "demo-1", "--port", str(port)))
    assert told.startswith(f"port {port} on 127.0.0.1 is in use")
    assert "use --port" in told


def test_asking_where_nothing_listens_is_refused(tmp_path: Path) -> None:
    port = free_port()
    (told,) = errors(run_tenure(tmp_path, "ask", "hello", "--url", f"http://127.0.0.1:{port}/v1"))
    assert told.startswith(f"http://127.0.0.1:{port}/v1: the endpoint cannot be reached")
