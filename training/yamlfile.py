"""YAML with line numbers: a mapping whose keys are unique and whose numbers follow YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from training.errors import Problem, TenureError, fail

Location = tuple[str | int, ...]
_DEEPEST = 12


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.2), where PyYAML sees a string (YAML 1.1)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping in a YAML file and the line (from 1) of every key and item in it.

    Raises:
        TenureError: no such file, empty, not UTF-8, not YAML, not a mapping, or a key given twice.
    """
    node = _compose(path, _read_text(path))
    if not isinstance(node, yaml.MappingNode):
        raise fail("a spec is a mapping of keys to values", str(path), "start from a file in examples/")
    lines: dict[Location, int] = {}
    twice: list[Problem] = []
    _collect_lines(node, (), path, lines, twice)
    if twice:
        raise TenureError(twice)
    loader = _Loader("")
    data: dict[str, Any] = loader.construct_document(node)
    return data, lines


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise fail("there is no such file", str(path), "give the path of a YAML spec; examples/ holds some")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"not UTF-8 text (byte {error.start})", str(path), "save the file as UTF-8") from None
    if not text.strip():
        raise fail("the file is empty", str(path), "start from a file in examples/")
    return text


def _compose(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise fail(f"not valid YAML: {error.problem}", where, "check indentation, colons and quotes") from None
    except yaml.YAMLError as error:
        raise fail(f"not valid YAML: {error}", str(path), "check for control characters") from None


def _collect_lines(
    node: yaml.Node, location: Location, path: Path, lines: dict[Location, int], twice: list[Problem]
) -> None:
    if len(location) > _DEEPEST:
        raise fail("nested too deeply", f"{path}:{node.start_mark.line + 1}", "a spec has at most four levels")
    lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                twice.append(Problem(f"the key '{key.value}' is given twice", f"{path}:{line}", "keep one of them"))
            seen.add(key.value)
            lines[(*location, key.value)] = line
            _collect_lines(value, (*location, key.value), path, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*location, index), path, lines, twice)
