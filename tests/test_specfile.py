"""Specs: every fault at once, each at its line and key, and the shape of a valid one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_spec import write_rows

from training.errors import TenureError
from training.spec import RunSpec
from training.specfile import load_spec
from training.strategy import Lora

ROOT = Path(__file__).resolve().parents[1]

VALID = """\
name: tiny
model: some/model
tuning: {type: lora, rank: 4}
data:
  train:
    - path: train.jsonl
      prompt: question
      completion: answer
suites:
  target:
    - {name: sums, path: sums.jsonl, metric: exact_match, prompt: question, completion: answer}
  retention:
    - {name: text, path: text.jsonl, metric: cross_entropy, text: text}
scaling: {workers: 2}
training:
  learning_rate: 1e-3
  global_batch_size: 8
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the data files that VALID names."""
    for name in ("train", "sums", "text"):
        write_rows(tmp_path / f"{name}.jsonl", [{"question": "1+1", "answer": "2", "text": "a"}])
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(old: str, new: str) -> str:
    assert VALID.count(old) == 1
    return VALID.replace(old, new)


def faults(folder: Path, text: str, **options: Any) -> list[tuple[str, str, str]]:
    """(line and key, reason, what to set instead) of every fault."""
    path = write(folder, text)
    with pytest.raises(TenureError) as caught:
        load_spec(path, **options)
    return [(p.where.removeprefix(f"{path}:"), p.what, p.instead) for p in caught.value.problems]


def test_a_valid_spec_has_its_values_and_absolute_paths(folder: Path) -> None:
    spec = load_spec(write(folder, VALID))
    assert spec.training.learning_rate == 1e-3
    assert spec.scaling.workers == 2
    assert spec.data.train[0].path == folder / "train.jsonl"
    assert [suite.name for suite in spec.suites.all] == ["sums", "text"]
    assert isinstance(spec.tuning, Lora)
    assert (spec.tuning.rank, spec.tuning.target_modules) == (4, "all-linear")


def test_a_spec_survives_its_json(folder: Path) -> None:
    spec = load_spec(write(folder, VALID))
    assert RunSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def test_all_faults_of_a_file_are_told_at_once(folder: Path) -> None:
    text = """\
name: tiny
modle: some/model
tuning: {type: lora, rnak: 4}
data:
  train:
    - path: nowhere.jsonl
      prompt: question
      completion: answer
  overlong: trunkate
suites:
  target:
    - {name: sums, path: sums.jsonl, metric: exact_match, prompt: question}
contract:
  max_loss: little
scaling: {workers: 3}
training:
  learning_rate: 1e-3
  global_batch_size: 8
"""
    assert faults(folder, text) == [
        ("1: model", "this key is missing", "add it"),
        (
            "2: modle",
            "unknown key 'modle'",
            "did you mean 'model'? known: contract, data, evaluation, export, model, name, objective, "
            "protections, scaling, suites, training, tuning",
        ),
        (
            "3: tuning.rnak",
            "unknown key 'rnak'",
            "did you mean 'rank'? known: alpha, bits, dropout, learning_rate_ratio, options, rank, target_modules, "
            "type",
        ),
        (
            "6: data.train[0].path",
            f"there is no file {folder / 'nowhere.jsonl'}",
            "a relative path starts at the spec's own folder",
        ),
        ("9: data.overlong", "'trunkate' is not known here", "did you mean 'truncate'? known: refuse, drop, truncate"),
        ("12: suites.target[0].completion", "this key is missing", "add it"),
        ("14: contract.max_loss", "'little' is not a number of at least 0", "give a number of at least 0"),
        ("18: training.global_batch_size", "8 does not divide by 3 workers", "set global_batch_size: 9"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "key", "what"),
    [
        (
            "workers: 2",
            "workers: 2, zero_stage: 5",
            "14: scaling.zero_stage",
            "5 is neither a whole number from 0 to 3 nor 'auto'",
        ),
        (
            "workers: 2",
            "workers: 2, zero_stage: on",
            "14: scaling.zero_stage",
            "True is neither a whole number from 0 to 3 nor 'auto'",
        ),
        ("workers: 2", "copy_to: runs/", "14: scaling.copy_to", "'runs/' is no URL"),
        ("workers: 2", "copy_to: 's9://x'", "14: scaling.copy_to", "the store s9:// is unknown"),
        ("workers: 2", "workers: two", "14: scaling.workers", "'two' is not a whole number of at least 1"),
        ("workers: 2", "workers: 2.0", "14: scaling.workers", "2.0 is not a whole number of at least 1"),
        ("workers: 2", "workers: 0", "14: scaling.workers", "0 is not a whole number of at least 1"),
        ("workers: 2", "workers:", "14: scaling.workers", "there is no value here"),
        (
            "_size: 8",
            "_size: 8\n  micro_batch_size: big",
            "18: training.micro_batch_size",
            "'big' is neither a whole number of at least 1 nor 'auto'",
        ),
        ("_size: 8", "_size: 8\n  max_steps: 0", "18: training.max_steps", "0 is not a whole number of at least 1"),
        ("1e-3", "fast", "16: training.learning_rate", "'fast' is not a number above 0"),
        ("1e-3", ".inf", "16: training.learning_rate", "inf is not a number above 0"),
        ("1e-3", "-1", "16: training.learning_rate", "-1 is not a number above 0"),
        ("rank: 4", "dropout: 1.5", "3: tuning.dropout", "1.5 is not a number from 0 to 1"),
        ("rank: 4", "target_modules: 3", "3: tuning.target_modules", "3 is neither 'all-linear' nor a list"),
        ("rank: 4", "target_modules: [q_proj, 3]", "3: tuning.target_modules[1]", "3 is not text"),
        ("{type: lora, rank: 4}", "lora", "3: tuning", "'lora' is not a section of keys and values"),
        ("{type: lora, rank: 4}", "{rank: 4}", "3: tuning", "the key 'type' is missing"),
        ("type: lora", "type: loraa", "3: tuning", "'loraa' is not known here"),
        ("name: tiny", "name: Tiny Model", "1: name", "'Tiny Model' is not a name"),
        (
            "prompt: question\n      completion: answer",
            "prompt: question",
            "6: data.train[0]",
            "rows need a prompt and a completion",
        ),
        (
            "metric: cross_entropy, text: text",
            "metric: surprise, text: text",
            "13: suites.retention[0]",
            "'surprise' is not known here",
        ),
        (
            "text: text}",
            "text: text, chat: 3}",
            "13: suites.retention[0].chat",
            "3 is neither true or false nor 'auto'",
        ),
    ],
)
def test_a_wrong_value_is_one_problem_at_its_key(folder: Path, old: str, new: str, key: str, what: str) -> None:
    assert [(k, w) for k, w, _ in faults(folder, changed(old, new))] == [(key, what)]


@pytest.mark.parametrize(
    ("old", "new", "key", "what", "instead"),
    [
        (
            "_size: 8",
            "_size: 8\n  micro_batch_size: 3",
            "17: training.global_batch_size",
            "8 does not divide by 2 workers x micro_batch_size 3",
            "set global_batch_size: 6",
        ),
        (
            "scaling:",
            "protections: [{type: l2sp, strength: 0.1, update: proximal}]\nscaling:",
            "14: protections[0]",
            "l2sp on the product of LoRA's matrices has no proximal step",
            "set update: coupled",
        ),
        (
            "name: text,",
            "name: sums,",
            "13: suites.retention[0]",
            "two suites are called 'sums'",
            "give each its own name",
        ),
        (
            "text: text}",
            "text: text, min_gain: 0.1}",
            "13: suites.retention[0].min_gain",
            "min_gain means nothing for a retention suite",
            "use max_loss",
        ),
        (
            "text: text}",
            "text: text, chat: true}",
            "13: suites.retention[0].chat",
            "plain text has no chat turns",
            "remove chat: true",
        ),
        (
            "completion: answer\nsuites",
            "completion: answer\n      messages: turns\nsuites",
            "9: data.train[0].messages",
            "messages stand beside other columns",
            "give messages alone",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_told_at_one_of_them(
    folder: Path, old: str, new: str, key: str, what: str, instead: str
) -> None:
    assert faults(folder, changed(old, new)) == [(key, what, instead)]


def test_one_protection_is_listed_once(folder: Path) -> None:
    twice = "[{type: l2sp, strength: 0.1}, {type: l2sp, strength: 0.2}]"
    text = changed("{type: lora, rank: 4}", "{type: full}") + f"protections: {twice}\n"
    assert faults(folder, text) == [("18: protections[1]", "l2sp is listed twice", "list each protection once")]


def test_an_empty_data_file_is_refused_and_files_can_be_left_unseen(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")
    assert faults(folder, VALID)[0][:2] == ("6: data.train[0].path", f"the file {folder / 'train.jsonl'} is empty")
    assert load_spec(folder / "spec.yaml", look_at_files=False).name == "tiny"


def test_the_models_finder_is_asked_and_its_refusal_told_at_the_key(folder: Path) -> None:
    def find(name: str) -> Path:
        raise ValueError(f"no {name} -> take another")

    assert faults(folder, VALID, find_model=find) == [("2: model", "no some/model", "take another")]
    assert load_spec(write(folder, VALID), find_model=lambda name: Path("/found") / name).model == "/found/some/model"


def test_a_key_merged_from_an_anchor_is_told_at_the_section_that_holds_it(folder: Path) -> None:
    text = changed("scaling: {workers: 2}", "scaling:\n  <<: {workers: 2, nodes: 3}")
    assert [(key, what) for key, what, _ in faults(folder, text)] == [("14: scaling.nodes", "unknown key 'nodes'")]


def test_a_spec_is_frozen(folder: Path) -> None:
    spec = load_spec(write(folder, VALID))
    with pytest.raises(ValidationError, match="frozen"):
        spec.training.epochs = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]
    assert isinstance(spec.data.train, tuple)


def test_reading_a_spec_imports_nothing_heavy(folder: Path) -> None:
    path = write(folder, VALID)
    code = f"""
import sys
from pathlib import Path
from training.specfile import load_spec
load_spec(Path({str(path)!r}))
print([m for m in ("torch", "ray", "transformers", "deepspeed", "peft", "datasets", "mlflow") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["kl", "flow", "stm"])
def test_dpo_goes_with_nothing_that_rests_on_tokens(folder: Path, kind: str) -> None:
    pairs = changed("      completion: answer\n", "      chosen: answer\n      rejected: question\n")
    text = pairs + f"objective: {{type: dpo}}\nprotections: [{{type: {kind}}}]\n"
    ((where, what, instead),) = faults(folder, text)
    assert where == "20: protections[0]"
    assert "dpo" in what
    assert instead == f"remove {kind}, or use objective: {{type: sft}}"


@pytest.mark.parametrize(
    ("objective", "row", "wanted"),
    [
        ("sft", {"text": "text"}, "completion or messages"),
        ("lm", {"prompt": "question", "completion": "answer"}, "text"),
        ("dpo", {"text": "text"}, "preference"),
        ("{type: distill, teacher: some/model}", {"text": "text"}, "completion or messages"),
    ],
)
def test_an_objective_names_the_forms_that_it_learns_from(
    folder: Path, objective: str, row: dict[str, str], wanted: str
) -> None:
    columns = "".join(f"      {key}: {column}\n" for key, column in row.items())
    text = changed("      prompt: question\n      completion: answer\n", columns)
    given = objective if objective.startswith("{") else f"{{type: {objective}}}"
    ((where, what, instead),) = faults(folder, text + f"objective: {given}\n")
    assert where.endswith(": data.train[0]")
    assert "cannot learn from rows of the form" in what
    assert instead == f"give {wanted}, or another objective"


def test_settings_of_objectives_out_of_range_are_refused(folder: Path) -> None:
    text = VALID + "objective: {type: distill, teacher: a/b, divergence: kl, weight: 1.5, temperature: 0, top_k: 0}\n"
    keys = [where.split(": ")[1] for where, _, _ in faults(folder, text)]
    assert sorted(keys) == [f"objective.{key}" for key in ("divergence", "temperature", "top_k", "weight")]
