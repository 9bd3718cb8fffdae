"""Everything a run is fed: encoded once, cached by content, and all files' faults at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_spec import sums, write_rows, write_tiny_spec
from transformers import AutoTokenizer

from training.data.encoding import encode_all
from training.data.prepare import load_prepared, prepare
from training.data.rows import read_conversations
from training.data.store import META
from training.errors import TenureError
from training.inspection.samples import read_samples
from training.spec import RunSpec
from training.specfile import load_spec
from training.workspace import Workspace, read_json, write_json


@pytest.fixture
def spec(tiny_model: Path, tmp_path: Path) -> RunSpec:
    return load_spec(write_tiny_spec(tmp_path / "spec", tiny_model))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


def with_text(spec: RunSpec, old: str, new: str) -> RunSpec:
    """The spec with a piece of its YAML changed."""
    path = spec.data.train[0].path.with_name("spec.yaml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return load_spec(path)


def test_what_is_read_back_is_what_was_encoded(spec: RunSpec, workspace: Workspace) -> None:
    prepared = load_prepared(prepare(spec, workspace))
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    expected, _ = encode_all(tokenizer, read_conversations(spec.data.train[0]), True, 64, "refuse")
    assert list(prepared.train) == expected
    assert {name: len(items) for name, items in prepared.validation.items()} == {"sums": 8, "sentences": 8}
    counts = prepared.counts()
    answers = sum(len(row["answer"]) + 1 for row in sums(48))  # a token a byte, and the end token
    assert (counts.num_examples, counts.num_target_tokens, counts.num_overlong) == (48, answers, 0)
    assert counts.num_tokens == sum(len(example.ids) for example in expected)
    assert counts.longest == max(len(example.ids) for example in expected)


def test_unchanged_data_is_encoded_once(spec: RunSpec, workspace: Workspace) -> None:
    path = prepare(spec, workspace)
    write_json(path / META, read_json(path / META) | {"num_overlong": 7})
    assert prepare(spec, workspace) == path
    assert load_prepared(path).num_overlong == 7


def test_all_that_decides_the_ids_makes_a_new_file(spec: RunSpec, workspace: Workspace, tmp_path: Path) -> None:
    paths = {prepare(spec, workspace)}
    paths.add(prepare(with_text(spec, "max_length: 64", "max_length: 65"), workspace))
    paths.add(prepare(with_text(spec, "prompt: question", "prompt: '{{ question }}?'"), workspace))
    write_rows(spec.data.train[0].path, sums(47))
    paths.add(prepare(spec, workspace))
    copy = tmp_path / "model"
    shutil.copytree(spec.model, copy)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\\n' }}{% endfor", "'\\n\\n' }}{% endfor"))
    paths.add(prepare(with_text(spec, spec.model, str(copy)), workspace))
    assert len(paths) == 5


def test_what_decides_no_id_keeps_the_file(spec: RunSpec, workspace: Workspace) -> None:
    path = prepare(spec, workspace)
    assert prepare(with_text(spec, "learning_rate: 0.001", "learning_rate: 0.1"), workspace) == path


def test_the_faults_of_every_file_are_told_at_once_and_nothing_is_kept(spec: RunSpec, workspace: Workspace) -> None:
    folder = spec.data.train[0].path.parent
    write_rows(folder / "train.jsonl", [{"question": "1+1", "answer": "2"}, {"question": "1+2"}, {"answer": "3"}])
    write_rows(folder / "sums.jsonl", [{"question": "1+1", "answer": 2}])
    (folder / "sentences.jsonl").write_text('{"text": \n')
    with pytest.raises(TenureError) as caught:
        prepare(spec, workspace)
    assert [problem.where for problem in caught.value.problems] == [
        f"{folder / 'train.jsonl'} row 2",
        f"{folder / 'train.jsonl'} row 3",
        f"{folder / 'sums.jsonl'} row 1",
        f"{folder / 'sentences.jsonl'} row 1",
    ]
    assert not any(workspace.cache.glob("tokens/*"))


def test_a_run_whose_rows_were_all_dropped_is_refused(spec: RunSpec, workspace: Workspace) -> None:
    short = with_text(with_text(spec, "max_length: 64", "max_length: 5"), "data:\n", "data:\n  overlong: drop\n")
    with pytest.raises(TenureError, match="no example is left to train on"):
        prepare(short, workspace)


CALLING = "{% if tools %}{{ tools[0].function.name }}\n{% endif %}"


def of_turns(spec: RunSpec, tmp_path: Path, rows: list[dict[str, object]]) -> RunSpec:
    """The spec with rows of turns, and a model whose template writes tools."""
    model = tmp_path / "calling"
    shutil.copytree(spec.model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(CALLING + template)
    write_rows(spec.data.train[0].path, rows)
    columns = "prompt: question\n    completion: answer\nsuites"
    return with_text(with_text(spec, columns, "messages: turns\nsuites"), spec.model, str(model))


def test_turns_tools_and_what_is_learned_come_from_the_file(
    spec: RunSpec, workspace: Workspace, tmp_path: Path
) -> None:
    ask, answer = {"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}
    turns, tool = [ask, answer, ask, answer | {"content": "07"}], {"name": "add", "parameters": {}}
    rows: list[dict[str, object]] = [{"turns": turns, "tools": [tool]}, {"turns": [ask, answer | {"weight": 0}]}]
    source = of_turns(spec, tmp_path, rows)
    with pytest.raises(TenureError, match="row 2: no target token is left to learn"):
        prepare(source, workspace)
    source = with_text(source, "data:\n", "data:\n  untaught: drop\n")
    told = {"all": [5], "last": [3], "each": [2, 3]}
    for learn, targets in told.items():
        chosen = with_text(source, "messages: turns", f"messages: turns\n    learn: {learn}")
        prepared = load_prepared(prepare(chosen, workspace))
        with_text(chosen, f"messages: turns\n    learn: {learn}", "messages: turns")
        assert [row.num_targets for row in prepared.train] == targets
        assert prepared.counts().num_untaught == 1
        assert str(AutoTokenizer.from_pretrained(spec.model).decode(list(prepared.train[0].ids))).startswith("add\n")


def test_rows_dropped_while_encoding_are_told_with_those_that_do_not_parse(
    spec: RunSpec, workspace: Workspace, tmp_path: Path
) -> None:
    """In what is prepared and in the plan: one row without its column, one with nothing to learn in a turn."""
    ask, answer = {"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}
    empty = [ask, answer | {"content": " "}, ask, answer]
    rows: list[dict[str, object]] = [{"turns": [ask, answer]}, {"other": 1}, {"turns": empty}, {"turns": [ask, answer]}]
    source = with_text(of_turns(spec, tmp_path, rows), "messages: turns", "messages: turns\n    faulty: drop")
    prepared = load_prepared(prepare(source, workspace))
    (faulty,) = prepared.faulty
    assert (len(prepared.train), faulty.num_rows, prepared.counts().num_faulty) == (2, 2, 2)
    assert [problem.where.rpartition(" ")[2] for problem in faulty.first] == ["2", "3"]
    assert list(read_samples(source.data.train[0]))[-1].where.endswith("row 4")


def test_messages_for_a_model_without_a_chat_template_are_refused(
    spec: RunSpec, workspace: Workspace, tmp_path: Path
) -> None:
    bare = tmp_path / "model"
    shutil.copytree(spec.model, bare)
    (bare / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    write_rows(spec.data.train[0].path, [{"turns": turns}])
    columns = "prompt: question\n    completion: answer\nsuites"
    chat = with_text(with_text(spec, columns, "messages: turns\nsuites"), spec.model, str(bare))
    with pytest.raises(TenureError, match="chat is asked for, but the model has no chat template"):
        prepare(chat, workspace)


def test_no_validation_is_possible(spec: RunSpec, workspace: Workspace) -> None:
    none = with_text(spec, "max_length: 64", "max_length: 64\n  validation_items: 0")
    assert load_prepared(prepare(none, workspace)).validation == {}


def test_a_torn_cache_is_made_again_and_told(
    spec: RunSpec, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepare(spec, workspace)
    whole = list(load_prepared(path).train)
    (path / "train.arrow").write_bytes((path / "train.arrow").read_bytes()[:-100])
    with pytest.raises(TenureError, match=r"cannot be read: it is not whole: train\.arrow has another length"):
        load_prepared(path)
    assert prepare(spec, workspace) == path
    assert list(load_prepared(path).train) == whole
    assert "are made again: it is not whole: train.arrow" in capsys.readouterr().out


def test_a_cache_of_another_version_is_made_again(spec: RunSpec, workspace: Workspace) -> None:
    path = prepare(spec, workspace)
    write_json(path / META, read_json(path / META) | {"version": 0, "num_overlong": 7})
    assert load_prepared(prepare(spec, workspace)).num_overlong == 0
