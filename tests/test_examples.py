"""The examples: each is a valid spec, for the reader and for editors that use the JSON Schema."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from sweeps.loading import is_sweep, load_sweep
from sweeps.spec import SweepSpec
from training.sequences.spec import SequenceSpec
from training.sequences.steps import is_sequence, load_sequence
from training.spec import RunSpec, Suites
from training.specfile import load_spec
from training.yamlfile import read_yaml

ROOT = Path(__file__).resolve().parents[1]
SERVING = ROOT / "examples" / "serving"  # specs of endpoints: see test_serving_spec.py
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if SERVING not in path.parents)


def test_the_demo_is_among_them() -> None:
    assert ROOT / "examples" / "demo" / "restore.yaml" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_a_valid_spec(path: Path) -> None:
    assert suites_of(path).retention, "an example watches what may be forgotten"


def suites_of(path: Path) -> Suites:
    if is_sweep(path):
        base = load_sweep(path, look_at_files=False)[0].base
        assert isinstance(base, RunSpec)
        return base.suites
    read = load_sequence if is_sequence(path) else load_spec
    return read(path, look_at_files=False).suites


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_json_schema_accepts_every_example_and_refuses_an_unknown_key(path: Path) -> None:
    data, _ = read_yaml(path)
    kind = SweepSpec if is_sweep(path) else SequenceSpec if is_sequence(path) else RunSpec
    inner = "contract" if is_sweep(path) else "training"
    validator = jsonschema.Draft202012Validator(kind.model_json_schema())
    assert list(validator.iter_errors(data)) == []
    for wrong in ({**data, "modle": 1}, {**data, inner: {**data[inner], "epoch": 1}}):
        assert list(validator.iter_errors(wrong)) != []
