"""Copies of runs in object storage: brought up to date while a run goes on, and restored where its disk is lost.

A store is a folder of any of fsspec's file systems (s3://, gs://, file://). In it lies STORE/RUN as the run's own
folder does, readable without Tenure, with the newest checkpoints, and as `job/` what was submitted. A checkpoint's
manifest is written last of it: what has none is no checkpoint, here as there.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from training.checkpoint import MANIFEST, find_damage
from training.errors import fail
from training.events import log_event
from training.workspace import RunFolder, Workspace

_LOOK_EVERY_S = 5.0
_CHECKPOINTS = "checkpoints"
_JOB = "job"
_LEFT_OUT = ("ray", "leave")


@dataclass
class Copy:
    """A run's copy in a store, and which of its files are there as they are here."""

    run: RunFolder
    job: Path
    filesystem: Any
    root: str
    known: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time (ns) of every file when it was copied, by its name in the copy."""

    @classmethod
    def of(cls, run: RunFolder, store: str) -> Copy:
        """The copy of a run, with the folder of the job that it was submitted as, if it was."""
        filesystem, root = _open(store)
        return cls(run, run.path.parent.parent / "jobs" / run.id, filesystem, f"{root}/{run.id}")

    def update(self) -> None:
        """Copy what is new or has changed; checkpoints that are gone here go there, once the newest stands there.

        Raises:
            OSError, or what the store's package raises: something could not be copied.
        """
        for file in _files(self.run.path):
            self._put(file, str(file.relative_to(self.run.path)))
        for file in _files(self.job) if self.job.is_dir() else ():
            self._put(file, f"{_JOB}/{file.relative_to(self.job)}")
        here = sorted(path for path in self.run.checkpoints.glob("step-*") if (path / MANIFEST).is_file())
        for checkpoint in here:
            self._put_checkpoint(checkpoint)
        if here and self._is_there(here[-1].name):
            self._drop_others({path.name for path in here})

    def _put(self, file: Path, name: str) -> None:
        try:
            about = file.stat()
        except FileNotFoundError:  # it was replaced meanwhile
            return
        stamp = (about.st_size, about.st_mtime_ns)
        if self.known.get(name) == stamp:
            return
        target = f"{self.root}/{name}"
        self.filesystem.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        self.filesystem.put_file(str(file), target)
        self.known[name] = stamp

    def _put_checkpoint(self, checkpoint: Path) -> None:
        """All files, and when they are there in their sizes the manifest; nothing where it goes meanwhile."""
        if self._is_there(checkpoint.name):
            return
        names = (
            sorted(file.name for file in checkpoint.iterdir() if file.name != MANIFEST) if checkpoint.is_dir() else []
        )
        for name in [*names, MANIFEST]:
            if name == MANIFEST and not all(self._is_whole(checkpoint / file) for file in names):
                return
            self._put(checkpoint / name, f"{_CHECKPOINTS}/{checkpoint.name}/{name}")

    def _is_there(self, checkpoint: str) -> bool:
        return bool(self.filesystem.exists(f"{self.root}/{_CHECKPOINTS}/{checkpoint}/{MANIFEST}"))

    def _is_whole(self, file: Path) -> bool:
        target = f"{self.root}/{_CHECKPOINTS}/{file.parent.name}/{file.name}"
        try:
            return bool(self.filesystem.exists(target)) and self.filesystem.size(target) == file.stat().st_size
        except FileNotFoundError:
            return False

    def _drop_others(self, kept: set[str]) -> None:
        for path in self.filesystem.ls(f"{self.root}/{_CHECKPOINTS}", detail=False):
            if PurePosixPath(path).name not in kept:
                self.filesystem.rm(path, recursive=True)


def _files(folder: Path) -> Iterator[Path]:
    """What is copied at any time: no checkpoints, Ray's own state, locks, or files that are being written."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if not hidden and parts[0] not in (*_LEFT_OUT, _CHECKPOINTS) and file.is_file():
            yield file


def _open(store: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    from training.data.locations import missing_store

    if missing := missing_store(store):
        raise fail(missing[0], store, missing[1])
    filesystem, root = url_to_fs(store)
    return filesystem, str(root).rstrip("/")


@contextmanager
def copied(
    run: RunFolder, store: str | None, tell: Callable[[str], None], every_s: float = _LOOK_EVERY_S
) -> Iterator[None]:
    """Keep a run's copy up to date while the body runs; without a store there is none.

    What fails on the way is told and tried again.

    Raises:
        TenureError: the copy could not be brought up to date after the body.
    """
    if store is None:
        yield
        return
    copy, ended = Copy.of(run, store), threading.Event()
    keeps = threading.Thread(target=_keep, args=(copy, store, ended, tell, every_s), daemon=True)
    keeps.start()
    try:
        yield
    finally:
        ended.set()
        keeps.join()
        fault = _try(copy)
        if fault:
            log_event(run, "copy_failed", store=store, what=fault)
            tell(f"the copy in {store} is not complete: {fault}")
    if fault:
        instead = f"check the store and its credentials, then: tenure resume {run.id}"
        raise fail(f"the run's copy is not complete: {fault}", store, instead)


def _keep(copy: Copy, store: str, ended: threading.Event, tell: Callable[[str], None], every_s: float) -> None:
    told = ""
    while not ended.wait(every_s):
        fault = _try(copy)
        if fault and not told:
            tell(f"the copy in {store} fails, and is tried again: {fault}")
            log_event(copy.run, "copy_failed", store=store, what=fault)
        told = fault


def _try(copy: Copy) -> str:
    """Bring a copy up to date; why that failed, or nothing."""
    try:
        copy.update()
    except Exception as error:  # the stores' packages raise errors of their own, which share no ancestor
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return ""


def restore_run(url: str, workspace: Workspace) -> RunFolder:
    """Bring a run back from its copy, STORE/RUN, with the newest checkpoint that is whole, and the job it was.

    Raises:
        TenureError: there is no copy, or the workspace has a run of that id.
    """
    filesystem, root = _open(url)
    run = RunFolder(workspace.runs / PurePosixPath(root).name)
    if run.path.exists():
        raise fail(f"the workspace has a run '{run.id}'", str(run.path), f"go on with it: tenure resume {run.id}")
    if not filesystem.exists(f"{root}/{run.spec.name}"):
        raise fail("there is no copy of a run", url, "give STORE/RUN, as in s3://bucket/runs/my-first-1")
    part = RunFolder(workspace.runs / f".{run.id}.part")
    shutil.rmtree(part.path, ignore_errors=True)
    for name in filesystem.find(root):
        inner = str(PurePosixPath(name).relative_to(root))
        if not inner.startswith((f"{_CHECKPOINTS}/", f"{_JOB}/")):
            _get(filesystem, name, part.path / inner)
    _restore_checkpoint(filesystem, root, part)
    _restore_job(filesystem, root, workspace.root / "jobs" / run.id)
    part.path.rename(run.path)
    return run


def _restore_checkpoint(filesystem: Any, root: str, run: RunFolder) -> None:
    """The newest whose files match its manifest; a damaged one is passed over, aloud."""
    place = f"{root}/{_CHECKPOINTS}"
    for found in sorted(filesystem.ls(place, detail=False), reverse=True) if filesystem.exists(place) else ():
        target = run.checkpoints / PurePosixPath(found).name
        for name in filesystem.find(found):
            _get(filesystem, name, target / PurePosixPath(name).name)
        fault = find_damage(target)
        if fault is None:
            return
        print(f"passing over checkpoint {found}: {fault}", flush=True)
        shutil.rmtree(target)


def _restore_job(filesystem: Any, root: str, job: Path) -> None:
    place = f"{root}/{_JOB}"
    if filesystem.exists(place) and not job.exists():
        for name in filesystem.find(place):
            _get(filesystem, name, job / str(PurePosixPath(name).relative_to(place)))


def _get(filesystem: Any, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    filesystem.get_file(name, str(target))
