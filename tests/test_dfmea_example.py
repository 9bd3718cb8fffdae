"""The DFMEA example's own text: every table is whole, in scale and in one split; what is written passes its metrics."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from training.evaluation.metrics import product, valid_table
from training.specfile import load_spec
from training.strategy import Replay
from training.suite_spec import Product, ValidTable

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dfmea"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dfmea_prepare", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare = load(EXAMPLE / "prepare.py")
COMPONENTS = prepare.read_components()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dfmea")
    prepare.write_tables(folder)
    return folder


def test_there_are_as_many_components_and_domains_as_the_readme_says() -> None:
    found = re.search(r"(\d+) components of (\d+) domains", (EXAMPLE / "README.md").read_text(encoding="utf-8"))
    assert found
    assert (len(COMPONENTS), len({component.domain for component in COMPONENTS})) == (int(found[1]), int(found[2]))
    assert len(COMPONENTS) >= 120
    assert len({component.name for component in COMPONENTS}) == len(COMPONENTS)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_a_component_is_described_and_every_line_is_whole_and_in_scale(component: Any) -> None:
    assert 8 <= len(component.description.split()) <= 30
    assert len(component.rows) >= 3
    assert len({row.texts[1] for row in component.rows}) == len(component.rows), "a failure mode comes twice"
    for row in component.rows:
        assert all(re.fullmatch(r"[A-Z0-9][\w ,.%'-]+", text) for text in row.texts), row
        assert all(1 <= rating <= 10 for rating in row.ratings)


def test_no_line_is_written_twice() -> None:
    causes = Counter((row.texts[1], row.texts[3]) for component in COMPONENTS for row in component.rows)
    assert max(causes.values()) == 1


def test_no_component_is_in_two_splits_and_every_domain_is_in_each(data: Path) -> None:
    parts = {name: rows(data / f"dfmea.{name}.jsonl") for name in ("train", "validation", "test")}
    described = [row["component"] for part in parts.values() for row in part]
    assert len(set(described)) == len(described) == len(COMPONENTS)
    assert len({frozenset(row["domain"] for row in part) for part in parts.values()}) == 1


def test_the_right_answers_are_right_by_the_metrics(data: Path) -> None:
    spec = load_spec(EXAMPLE / "spec.yaml", look_at_files=False)
    tables = next(suite for suite in spec.suites.target if isinstance(suite, ValidTable))
    products = next(suite for suite in spec.suites.target if isinstance(suite, Product))
    for part in ("train", "validation", "test"):
        for row in rows(data / f"dfmea.{part}.jsonl"):
            assert valid_table(tables, row["dfmea"], "").score == 1.0
            assert product(products, row["dfmea"], "").score == 1.0
    assert all(product(products, row["table"], "").score == 1.0 for row in rows(data / "ratings.jsonl"))


def test_the_specs_differ_in_how_they_tune_alone() -> None:
    """So their scores are of one protocol, and tenure compare takes them."""
    plain, *others = (load_spec(EXAMPLE / f"{name}.yaml", look_at_files=False) for name in ("spec", "lora", "replay"))
    tuned = {"name", "tuning", "protections"}
    for other in others:
        assert other.model_dump(exclude={*tuned, "training"}) == plain.model_dump(exclude={*tuned, "training"})
        rates = {"learning_rate"}
        assert other.training.model_dump(exclude=rates) == plain.training.model_dump(exclude=rates)
    assert [spec.protection(Replay) is not None for spec in (plain, *others)] == [False, False, True]


def test_the_files_are_the_same_every_time(data: Path, tmp_path: Path) -> None:
    prepare.write_tables(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in data.iterdir()
    }
