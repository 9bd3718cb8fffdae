"""The examples: each is a valid spec, for the reader and for editors that use the JSON Schema."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from training.sequences.spec import SequenceSpec
from training.sequences.steps import is_sequence, load_sequence
from training.spec import RunSpec
from training.specfile import load_spec
from training.yamlfile import read_yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_the_demo_is_among_them() -> None:
    assert ROOT / "examples" / "demo" / "restore.yaml" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_a_valid_spec(path: Path) -> None:
    read = load_sequence if is_sequence(path) else load_spec
    spec = read(path, look_at_files=False)
    assert spec.suites.retention, "an example watches what may be forgotten"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_json_schema_accepts_every_example_and_refuses_an_unknown_key(path: Path) -> None:
    data, _ = read_yaml(path)
    kind = SequenceSpec if is_sequence(path) else RunSpec
    validator = jsonschema.Draft202012Validator(kind.model_json_schema())
    assert list(validator.iter_errors(data)) == []
    for wrong in ({**data, "modle": 1}, {**data, "training": {**data["training"], "epoch": 1}}):
        assert [error.validator for error in validator.iter_errors(wrong)] == ["additionalProperties"]
