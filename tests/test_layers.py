"""Which package imports which: cluster uses all, serving and sweeps use training, training uses none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_USE = {"training": set(), "serving": {"training"}, "sweeps": {"training"}}
# A doorway for those who start a sweep from Python: what it opens is the command line's own way.
DOORWAYS = {"sweeps/__init__.py"}


@pytest.mark.parametrize("package", sorted(MAY_USE))
def test_a_package_imports_what_lies_below_it_alone(package: str) -> None:
    others = {"cluster", "serving", "sweeps", "training", "benchmarks"} - {package}
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        if str(file.relative_to(ROOT)) not in DOORWAYS
        for name in imported(file)
        if name in others - MAY_USE[package]
    }
    assert wrong == set()


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports, within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
