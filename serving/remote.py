"""Adapters from object storage: copied once to the endpoint's own folder, where they are checked and loaded from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from serving.refusals import Refusal

_LARGEST_BYTES = 8 * 2**30


def is_remote(address: str) -> bool:
    """Whether this is an address of a store, such as s3://BUCKET/FOLDER, and no path."""
    return "://" in address


def copied(address: str, folder: Path) -> Path:
    """A new folder below `folder` with the files at an address of any of fsspec's stores.

    Raises:
        Refusal: 400, there is nothing there, it is too large, or it cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix="adapter-", dir=folder))
    try:
        _copy(address, target)
    except (OSError, ValueError, ImportError) as error:
        shutil.rmtree(target)
        raise _unread(address, str(error) or type(error).__name__) from error
    except Refusal:
        shutil.rmtree(target)
        raise
    return target


def _copy(address: str, target: Path) -> None:
    from fsspec.core import url_to_fs

    store, path = url_to_fs(address)
    found: list[dict[str, Any]] = [file for file in store.ls(path, detail=True) if file["type"] == "file"]
    size = sum(int(file.get("size") or 0) for file in found)
    if not found:
        raise _unread(address, "there is no file in it")
    if size > _LARGEST_BYTES:
        raise _unread(address, f"it holds {size:,} bytes, more than the {_LARGEST_BYTES:,} that are copied")
    for file in found:
        store.get_file(file["name"], str(target / PurePosixPath(file["name"]).name))


def _unread(address: str, why: str) -> Refusal:
    message = f"the adapter at {address[:200]} cannot be copied: {why.splitlines()[0][:300]}"
    return Refusal(400, message, "unreadable_address", "model")
