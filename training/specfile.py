"""Reads a spec file and tells every fault in it with file, line, key, reason and the nearest valid choice."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from training.errors import Problem, TenureError, fail
from training.section import Section
from training.spec import RunSpec
from training.yamlfile import Location, read_yaml

AnySection = TypeVar("AnySection", bound=Section)


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
    context = {"folder": path.parent, "look_at_files": look_at_files, "find_model": find_model}
    spec, _ = read_section(RunSpec, path, context)
    return spec


def read_section(kind: type[AnySection], path: Path, context: dict[str, Any]) -> tuple[AnySection, dict[Location, int]]:
    """A YAML file validated as a whole, and the line of every key in it.

    Raises:
        TenureError: with every fault found.
    """
    data, lines = read_yaml(path)
    if kind is RunSpec and "tasks" in data:
        raise fail("tasks make this a sequence", where_of(("tasks",), path, lines), f"run: tenure sequence {path}")
    try:
        return kind.model_validate(data, context=context), lines
    except ValidationError as error:
        raise TenureError(_problems(kind, error.errors(), data, path, lines)) from None


def _problems(
    kind: type[Section], faults: list[ErrorDetails], data: dict[str, Any], path: Path, lines: dict[Location, int]
) -> list[Problem]:
    """One problem a key, in the order of the file.

    Where a key takes this or that, pydantic tells why it is neither; where it takes a section or a list too, and was
    given one, only the faults inside tell anything.
    """
    by_key: dict[Location, list[ErrorDetails]] = {}
    for fault in faults:
        by_key.setdefault(_location(fault, data), []).append(fault)
    told = [key for key in by_key if not any(key != other and key == other[: len(key)] for other in by_key)]
    told.sort(key=lambda key: _line(key, lines))
    return [_problem(kind, by_key[key][0], where_of(key, path, lines)) for key in told]


def _problem(kind: type[Section], fault: ErrorDetails, where: str) -> Problem:
    what, instead = tell(kind, fault)
    return Problem(what, where, instead)


def _line(key: Location, lines: dict[Location, int]) -> int:
    while key not in lines:
        key = key[:-1]
    return lines[key]


def where_of(key: Location, path: Path, lines: dict[Location, int]) -> str:
    """File, line and name of a key."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")
    return f"{path}:{_line(key, lines)}: {name}" if name else f"{path}:{_line(key, lines)}"


def _location(fault: ErrorDetails, data: Any) -> Location:
    """Where in the file a fault is: its location without the union tags that pydantic puts between the keys."""
    kept: list[str | int] = []
    for part in fault["loc"]:
        inside = isinstance(data, dict) and part in data
        inside = inside or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        if inside:
            kept.append(part)
            data = data[part]
    if fault["type"] == "missing":
        kept.append(fault["loc"][-1])
    return (*kept, *fault.get("ctx", {}).get("at", ()))


def tell(kind: type[Section], fault: ErrorDetails) -> tuple[str, str]:
    """What is wrong and what to set instead, in our words where pydantic's need its documentation."""
    wrong, given, location = fault["type"], fault["input"], fault["loc"]
    context = fault.get("ctx", {})
    if wrong == "tenure":
        return context["what"], context["instead"]
    if wrong == "extra_forbidden":
        known = sorted(_schema_at(kind, location[:-1]).get("properties", {}))
        return f"unknown key '{location[-1]}'", _nearest(str(location[-1]), known)
    if wrong == "missing":
        return "this key is missing", "add it"
    if wrong == "union_tag_invalid":
        shown = given.get(_tag_name(context))
        return f"{shown!r} is not known here", _nearest(str(shown), _quoted(context["expected_tags"]))
    if wrong == "union_tag_not_found":
        name = _tag_name(context)
        return f"the key '{name}' is missing", f"say which with {name}: ..."
    if wrong == "string_pattern_mismatch":
        return f"{given!r} is not a name", "use lower-case letters, digits, '.', '_' and '-', 63 at most"
    if wrong == "value_error":
        what, _, instead = str(context["error"]).partition(" -> ")
        return what, instead
    return _tell_value(given, _schema_at(kind, location))


def _tell_value(given: Any, schema: dict[str, Any]) -> tuple[str, str]:
    """A value that is none of those that its key takes."""
    wanted = [_describe(member) for member in schema.get("anyOf", [schema]) if member.get("type") != "null"]
    words = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if words:
        return f"{given!r} is not known here", _nearest(str(given), words)
    instead = f"give {' or '.join(wanted)}"
    if given is None or given == "":
        return "there is no value here", instead
    shown = reprlib.repr(given)
    return f"{shown} is neither {' nor '.join(wanted)}" if len(wanted) > 1 else f"{shown} is not {wanted[0]}", instead


def _describe(schema: dict[str, Any]) -> str:
    """The values that a part of the JSON Schema takes, in words."""
    if "const" in schema:
        return f"'{schema['const']}'"
    if "enum" in schema:
        return " or ".join(f"'{word}'" for word in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"{'a whole number' if kind == 'integer' else 'a number'}{_bounds(schema)}"
    if kind == "array":
        least = schema.get("minItems", 0)
        return f"a list of {least} or more" if least else "a list"
    return {"boolean": "true or false", "string": "text"}.get(str(kind), "a section of keys and values")


def _bounds(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    if "minimum" in schema:
        return f" of at least {schema['minimum']:g}"
    return f" above {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']+)'", text)


def _tag_name(context: dict[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


def _nearest(given: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    known = ", ".join(valid)
    return f"did you mean '{close[0]}'? known: {known}" if close else f"known: {known}"


def _schema_at(kind: type[Section], location: tuple[str | int, ...]) -> dict[str, Any]:
    """The JSON Schema of what stands at a location: keys, indices and the tags of unions."""
    schema = kind.model_json_schema()
    here: dict[str, Any] = schema
    for part in location:
        if isinstance(part, int):
            lists = [member for member in here.get("anyOf", [here]) if "items" in member]
            here = lists[0]["items"]
        elif "discriminator" in here:
            here = {"$ref": here["discriminator"]["mapping"][part]}
        else:
            # A part that is no key is the tag of a union's member, which the union's own schema tells more about.
            sections = _sections(here, schema)
            here = next((section["properties"][part] for section in sections if part in section["properties"]), here)
        while "$ref" in here:
            here = schema["$defs"][here["$ref"].rsplit("/", 1)[1]]
    return here


def _sections(here: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that a key takes: itself, or those that stand beside other kinds of values."""
    members = [member for member in here.get("anyOf", ()) if "$ref" in member]
    named = [schema["$defs"][member["$ref"].rsplit("/", 1)[1]] for member in members]
    return [section for section in (here, *named) if "properties" in section]
