"""YAML with line numbers: a mapping whose keys are unique and whose numbers follow YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from training.errors import Problem, TenureError, fail

Location = tuple[str | int, ...]
_DEEPEST = 12
_MOST = 10_000


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
        TenureError: no such file, empty, not UTF-8, not YAML, not a mapping, too large, or a key given twice.
    """
    node = _compose(path, _read_text(path))
    if not isinstance(node, yaml.MappingNode):
        raise fail("a spec is a mapping of keys to values", str(path), "start from a file in examples/")
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    _collect_lines(node, (), path, lines, problems)
    if problems:
        raise TenureError(problems)
    return _construct(path, node), lines


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
        raise _invalid(path, error) from None
    except yaml.YAMLError as error:
        raise fail(f"not valid YAML: {error}", str(path), "check for control characters") from None
    except RecursionError:
        raise fail("nested too deeply", str(path), _FLATTER) from None


def _construct(path: Path, node: yaml.MappingNode) -> dict[str, Any]:
    try:
        data: dict[str, Any] = _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _invalid(path, error) from None
    except ValueError as error:
        # PyYAML's own words for a date such as 2026-99-99 or a number with too many digits
        raise fail(f"not valid YAML: {error}", str(path), "put quotes around what is not a number or date") from None
    return data


def _invalid(path: Path, error: yaml.MarkedYAMLError) -> TenureError:
    where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
    return fail(f"not valid YAML: {error.problem}", where, "check indentation, colons and quotes")


_FLATTER = "a spec has at most four levels"


def _collect_lines(
    node: yaml.Node, location: Location, path: Path, lines: dict[Location, int], problems: list[Problem]
) -> None:
    """The line of every key and item; aliases are walked as copies, so their number is bounded."""
    if len(location) > _DEEPEST:
        raise fail("nested too deeply", f"{path}:{node.start_mark.line + 1}", _FLATTER)
    if len(lines) > _MOST:
        raise fail(f"more than {_MOST:,} values", str(path), "put data into files, and name them here")
    lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in _KEY_TAGS:
                problems.append(Problem("a key that is not text", f"{path}:{line}", "put quotes around it"))
                continue
            if key.value in seen:
                problems.append(Problem(f"the key '{key.value}' is given twice", f"{path}:{line}", "keep one of them"))
            seen.add(key.value)
            lines[(*location, key.value)] = line
            _collect_lines(value, (*location, key.value), path, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*location, index), path, lines, problems)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
