"""What a submitted job takes with it: this package's code, the spec, and the small files that the spec names.

Relative paths of a spec are packed and keep their places; absolute ones and URLs stay where they are, and every node
has to see them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.locations import is_url
from training.errors import Problem, fail, raise_all
from training.workspace import write_json
from training.yamlfile import read_yaml

PACKED_BYTES = 100 * 2**20
JOB_FILE = "job.json"
_PACKAGES = ("cluster", "serving", "sweeps", "training")
_FILES = "files"
_PATH_KEYS = ("path", "json_schema", "importance", "model", "teacher")
_SHARED = "put it where every node sees it, and give its absolute path or URL in the spec"


@dataclass(frozen=True)
class Packed:
    """What was packed beside the code: the files and their bytes, and the places that every node must see."""

    files: tuple[Path, ...]
    num_bytes: int
    shared: tuple[str, ...]


def pack(command: str, subject: str, run_id: str, spec: Path | None, target: Path, of: str | None = None) -> Packed:
    """Lay out the folder of a job: code, job.json, and under files/ the spec with what it names.

    Args:
        subject: what the command is given, where it is no spec: the run to serve.
        spec: a spec's file, for commands that take one.
        of: the artifact to score, for the one that scores one.

    Raises:
        TenureError: the spec cannot be read, or a file is too large to travel; names each.
    """
    files, shared = references(spec) if spec else ([], [])
    sizes = {file: file.stat().st_size for file in files}
    raise_all(_too_large(sizes))
    _copy_code(target)
    if spec:
        root = Path(os.path.commonpath([file.parent for file in files]))
        for file in files:
            _copy(file, target / _FILES / file.relative_to(root))
        subject = str(Path(_FILES) / spec.resolve().relative_to(root))
    job = {"id": run_id, "command": command, "subject": subject}
    write_json(target / JOB_FILE, {**job, "of": of} if of else job)
    return Packed(tuple(files), sum(sizes.values()), tuple(shared))


def references(spec: Path) -> tuple[list[Path], list[str]]:
    """The files that a spec's relative paths lead to, itself first; and the absolute paths and URLs that it names."""
    files, shared = [spec.resolve()], []
    for key, value in _named(read_yaml(spec)[0]):
        if is_url(value) or Path(value).is_absolute():
            shared.append(value)
        elif key == "base":
            more, far = references(spec.parent / value)
            files, shared = files + more, shared + far
        else:
            files += _found(spec.parent.resolve(), value)
    return list(dict.fromkeys(files)), list(dict.fromkeys(shared))


def _named(value: Any) -> Iterator[tuple[str, str]]:
    """Every text that stands under a key of paths, wherever in the spec."""
    if isinstance(value, list):
        for part in value:
            yield from _named(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if isinstance(part, str) and key in (*_PATH_KEYS, "base"):
                yield key, part
            else:
                yield from _named(part)


def _found(folder: Path, name: str) -> list[Path]:
    """The files of a relative path, folder or glob; none for a name that is no file, such as that of a hub's model."""
    path = Path(os.path.normpath(folder / name))
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    return sorted(Path(os.path.normpath(file)) for file in folder.glob(name) if file.is_file())


def _too_large(sizes: dict[Path, int]) -> list[Problem]:
    """Files above the bound by themselves; else the largest, where they are too large together."""
    limit = f"{PACKED_BYTES / 2**20:,.0f} MiB"
    large = {file: size for file, size in sizes.items() if size > PACKED_BYTES}
    if large:
        told = "{:,.1f} GiB, and a job takes " + limit + " with it"
        return [Problem(told.format(size / 2**30), str(file), _SHARED) for file, size in large.items()]
    total = sum(sizes.values())
    if total > PACKED_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        what = f"{len(sizes)} files of {total / 2**20:,.0f} MiB in all, and a job takes {limit} with it; this is the"
        return [Problem(f"{what} largest", str(largest), _SHARED)]
    return []


def _copy_code(target: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    for name in _PACKAGES:
        shutil.copytree(here / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        raise fail(error.strerror or str(error), str(file), "make it readable, or take it out of the spec") from None
