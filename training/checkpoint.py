"""Checkpoints: written by every rank, verified by a manifest, published by one rename.

A checkpoint is the folder `step-N` (N optimizer steps done). While it is being written its name starts with a dot,
so a half-written one is never found; one whose files do not match its manifest is never loaded.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.errors import fail
from training.models import hash_file
from training.protections import AttachedProtection
from training.workspace import read_json, write_json

_ENGINE = "engine"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shape:
    """What a checkpoint must agree on with the run that loads it."""

    spec_hash: str
    workers: int
    zero_stage: int


def save_checkpoint(
    folder: Path, step: int, engine: Any, protections: list[AttachedProtection], shape: Shape, keep: int
) -> None:
    """Write the state after `step` optimizer steps; every rank calls it. Older ones go only once it stands."""
    final = folder / f"step-{step:07d}"
    part = folder / f".step-{step:07d}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(part), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_rank_state(protections), _rank_file(part))
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(part, final, step, shape)
        _remove_old(folder, keep)
    dist.barrier()


def load_checkpoint(checkpoint: Path, engine: Any, protections: list[AttachedProtection], shape: Shape) -> int:
    """Restore engine, protections and random state; every rank calls it. The number of steps done.

    Raises:
        TenureError: it is of another spec, number of workers or ZeRO stage.
    """
    manifest = read_json(checkpoint / _MANIFEST)
    saved = Shape(**manifest["shape"])
    if saved != shape:
        what = f"the checkpoint is of another run: it has {saved}, this run {shape}"
        raise fail(what, str(checkpoint), "resume with the spec, workers and ZeRO stage it was made with")
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE, load_module_strict=False)
    if loaded is None:
        raise fail("DeepSpeed could not load the checkpoint", str(checkpoint), "see the worker's log")
    state = torch.load(_rank_file(checkpoint), weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    for protection, kept in zip(protections, state["protections"], strict=True):
        protection.restore(kept)
    return int(manifest["step"])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; a damaged one is passed over, aloud."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        fault = find_damage(candidate)
        if fault is None:
            return candidate
        print(f"passing over checkpoint {candidate}: {fault}", flush=True)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being loaded, or None."""
    manifest = checkpoint / _MANIFEST
    if not manifest.is_file():
        return "it has no manifest"
    for name, expected in read_json(manifest)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
            return f"{name} has changed"
    return None


def _rank_file(folder: Path) -> Path:
    return folder / f"rank-{dist.get_rank():05d}.pt"


def _rank_state(protections: list[AttachedProtection]) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "protections": [protection.state() for protection in protections],
    }


def _publish(part: Path, final: Path, step: int, shape: Shape) -> None:
    files = {
        str(file.relative_to(part)): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        for file in sorted(part.rglob("*"))
        if file.is_file()
    }
    write_json(part / _MANIFEST, {"step": step, "shape": vars(shape), "files": files})
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)


def _remove_old(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
