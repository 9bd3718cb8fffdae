"""Reads a spec file and tells every fault in it with file, line, key, reason and the nearest valid choice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from training.errors import Problem, TenureError
from training.spec import RunSpec
from training.yamlfile import Location, read_yaml


def load_spec(
    path: Path, *, look_at_files: bool = True, find_model: Callable[[str], str | Path] | None = None
) -> RunSpec:
    """The validated spec in a YAML file, its data paths absolute.

    Args:
        look_at_files: refuse data files that are missing or empty.
        find_model: turns the spec's model into a local folder, or raises ValueError.

    Raises:
        TenureError: with every fault found.
    """
    data, lines = read_yaml(path)
    context = {"folder": path.parent, "look_at_files": look_at_files, "find_model": find_model}
    try:
        return RunSpec.model_validate(data, context=context)
    except ValidationError as error:
        faults = [_problem(fault, data, path, lines) for fault in error.errors()]
        raise TenureError(sorted(set(faults), key=lambda fault: _line_of(fault.where))) from None


def _line_of(where: str) -> int:
    match = re.search(r":(\d+):", where)
    return int(match.group(1)) if match else 0


def _problem(fault: ErrorDetails, data: dict[str, Any], path: Path, lines: dict[Location, int]) -> Problem:
    context = fault.get("ctx", {})
    location = _without_tags((*fault["loc"], *context.get("at", ())), data)
    known = location
    while known not in lines:
        known = known[:-1]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    where = f"{path}:{lines[known]}: {key}" if key else f"{path}:{lines[known]}"
    what, instead = _tell(fault, context)
    return Problem(what, where, instead)


def _without_tags(location: Location, data: Any) -> Location:
    """The location without the union tags that pydantic puts between the keys of the file."""
    kept: list[str | int] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        inside = isinstance(data, dict) and part in data
        inside = inside or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        if inside:
            kept.append(part)
            data = data[part]
        elif is_last and isinstance(data, dict):
            kept.append(part)
    return tuple(kept)


def _tell(fault: ErrorDetails, context: dict[str, Any]) -> tuple[str, str]:
    """What is wrong and what to set instead, in our words where pydantic's need its documentation."""
    kind, given = fault["type"], fault["input"]
    if kind == "tenure":
        return context["what"], context["instead"]
    if kind == "extra_forbidden":
        return f"unknown key '{fault['loc'][-1]}'", _nearest(str(fault["loc"][-1]), _keys_at(fault["loc"][:-1]))
    if kind == "missing":
        return "this key is missing", "add it"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = re.findall(r"'([^']+)'", str(context.get("expected") or context.get("expected_tags")))
        shown = given.get(_tag_name(context)) if kind == "union_tag_invalid" else given
        return f"{shown!r} is not known here", _nearest(str(shown), expected)
    if kind == "union_tag_not_found":
        name = _tag_name(context)
        return f"the key '{name}' is missing", f"say which with {name}: ..."
    if kind == "string_pattern_mismatch":
        return f"{given!r} is not a name", "use lower-case letters, digits, '.', '_' and '-', 63 at most"
    if kind == "value_error":
        what, _, instead = str(context["error"]).partition(" -> ")
        return what, instead
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, not {given!r}", ""


def _tag_name(context: dict[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


def _nearest(given: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    known = ", ".join(valid)
    return f"did you mean '{close[0]}'? known: {known}" if close else f"known: {known}"


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at a location takes, found by walking the JSON Schema."""
    schema = RunSpec.model_json_schema()
    here: dict[str, Any] = schema
    for part in location:
        if isinstance(part, int):
            here = here.get("items", {})
        elif "discriminator" in here:
            here = {"$ref": here["discriminator"]["mapping"][part]}
        else:
            here = here.get("properties", {}).get(part, {})
        while "$ref" in here:
            here = schema["$defs"][here["$ref"].rsplit("/", 1)[1]]
    return sorted(here.get("properties", {}))
