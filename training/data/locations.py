"""Where data lie: a file, a glob, a folder, a saved dataset, a dataset of the hub, or a URL of any store of fsspec.

All of these are one or more files, which are opened here, unpacked on the way, and hashed.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from training.data.hub import hub_files
from training.errors import TenureError, fail

Location = Path | str
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


def _unpack_zstd(stream: BinaryIO) -> BinaryIO:
    import pyarrow

    return BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))


_UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstd,
}


@dataclass(frozen=True)
class DataFile:
    """One file of data: what faults call it, where it is, and its fsspec file system (None: this machine's).

    Files of the same name are parts of one, whose rows are counted on.
    """

    name: str
    path: str
    filesystem: Any = None

    @property
    def ending(self) -> str:
        """The ending that tells the format, without that of the compression."""
        path = Path(self.path)
        return Path(path.stem if path.suffix in _UNPACKERS else path.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Its bytes, unpacked where the last ending names a compression."""
        raw = self.open_raw()
        unpack = _UNPACKERS.get(Path(self.path).suffix)
        return unpack(raw) if unpack else raw

    def open_raw(self) -> BinaryIO:
        """Its bytes as they are."""
        return cast(BinaryIO, self.filesystem.open(self.path, "rb")) if self.filesystem else open(self.path, "rb")


def is_url(text: str) -> bool:
    """Whether a location names a store, as in s3://bucket/rows.jsonl."""
    return "://" in text


def files_of(location: Location) -> list[DataFile]:
    """The files behind a location, in the order of their names; at least one.

    Raises:
        TenureError: there is none, a package is missing, or the store cannot be reached.
    """
    if isinstance(location, Path):
        return _local_files(location)
    if location.startswith("hf://") and not location.startswith("hf://datasets/"):
        return [DataFile(*named) for named in hub_files(location)]
    return _remote_files(location)


def is_there(location: Location) -> bool:
    """Whether there are files behind a location on this machine; a URL is taken at its word."""
    try:
        return isinstance(location, str) or bool(_local_files(location))
    except TenureError:
        return False


def _local_files(path: Path) -> list[DataFile]:
    if path.is_dir():
        return _files_in(path)
    if path.exists():
        return [DataFile(str(path), str(path))]
    if not has_magic(str(path)):
        raise fail(f"there is no file {path}", str(path), "a relative path starts at the spec's own folder")
    found = [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise fail(f"no file matches {path}", str(path), "a relative path starts at the spec's own folder")
    return [DataFile(str(file), str(file)) for file in found]


def _files_in(folder: Path) -> list[DataFile]:
    """The files of a saved dataset, or all below a folder that are known by their endings."""
    if (folder / "dataset_dict.json").is_file():
        return _files_in(folder / _only_split(folder))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [DataFile(str(folder), str(folder / part["filename"])) for part in state["_data_files"]]
    found = _known(str(file) for file in folder.rglob("*") if file.is_file())
    if not found:
        raise fail(f"the folder {folder} holds no data files", str(folder), _KNOWN)
    return [DataFile(file, file) for file in found]


def _only_split(folder: Path) -> str:
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if len(splits) != 1:
        raise fail(f"the dataset has the splits {', '.join(splits)}", str(folder), f"give one: {folder / splits[0]}")
    return str(splits[0])


def _known(paths: Iterable[str]) -> list[str]:
    return sorted(path for path in paths if DataFile(path, path).ending in ENDINGS)


_KNOWN = f"known by their endings: {', '.join(ENDINGS)}, packed as {', '.join(_UNPACKERS)} or not"


def missing_store(url: str) -> tuple[str, str] | None:
    """A store that is unknown, or whose package is not installed here, and what to do; None when all is there."""
    from fsspec.registry import known_implementations

    protocol = url.split("://", 1)[0]
    known = known_implementations.get(protocol)
    if known is None:
        return f"the store {protocol}:// is unknown", "give a path, or a URL such as s3://, gs://, https:// or hf://"
    package = known["class"].split(".")[0]
    if find_spec(package) is None:
        return f"{protocol}:// needs the package {package}, which is not installed", f"run: pip install {package}"
    return None


def _remote_files(url: str) -> list[DataFile]:
    missing = missing_store(url)
    if missing:
        raise fail(missing[0], url, missing[1])
    try:
        return _listed(url)
    except TenureError:
        raise
    except Exception as error:
        # The stores' packages raise errors of their own, which share no ancestor.
        raise fail(
            f"the store gave no answer: {_reason(error)}", url, "check the address and the credentials"
        ) from None


def _listed(url: str) -> list[DataFile]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    if has_magic(path):
        found = sorted(name for name in filesystem.glob(path) if filesystem.isfile(name))
    else:
        found = _known(filesystem.find(path)) if filesystem.isdir(path) else [path] * filesystem.exists(path)
    if not found:
        raise fail("there is no such file", url, f"give a file, a glob, or a folder of data files; {_KNOWN}")
    return [DataFile(str(filesystem.unstrip_protocol(name)), name, filesystem) for name in found]


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def hash_data(location: Location) -> str:
    """SHA-256 of a file's bytes, or of the hashes of all files behind a location."""
    hashes = [_hash(file) for file in files_of(location)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash(file: DataFile) -> str:
    with file.open_raw() as stream:
        return hashlib.file_digest(cast(BytesIO, stream), "sha256").hexdigest()
