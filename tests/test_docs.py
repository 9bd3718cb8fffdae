"""The documentation names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.cli import cli
from serving.spec import ServingSpec
from sweeps.spec import Budget, Range, Split, Strategy, SweepSpec
from training.sequences.spec import CarriedEwc, CarriedReplay, CarriedSi, SequenceSpec, Task
from training.spec import RunSpec

ROOT = Path(__file__).parents[1]
CARRIED = (CarriedReplay, CarriedEwc, CarriedSi)


def test_every_key_of_the_spec_is_documented() -> None:
    schema = RunSpec.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", {})}
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "spec.md").read_text()))
    assert keys - documented == set()


def test_every_key_of_a_sequence_is_documented() -> None:
    keys = {key for kind in (SequenceSpec, Task, *CARRIED) for key in kind.model_fields}
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("spec.md", "sequences.md"))
    assert keys - set(re.findall(r"`([a-z0-9_]+)`", pages)) == set()


def test_every_key_of_a_sweep_is_documented() -> None:
    keys = {key for kind in (SweepSpec, Strategy, Range, Budget, Split) for key in kind.model_fields}
    assert keys - set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "sweeps.md").read_text())) == set()


def test_every_key_of_serving_is_documented() -> None:
    schema = ServingSpec.model_json_schema()
    keys = {key for section in (schema, *schema["$defs"].values()) for key in section.get("properties", {})}
    assert keys - set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "serving.md").read_text())) == {"type"}


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    table = " ".join(re.findall(r"^\| `tenure.*", text, re.MULTILINE))
    assert [name for name in cli.commands if not re.search(rf"\b{name}\b", table)] == []


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
