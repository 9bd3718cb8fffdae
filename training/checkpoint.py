"""Checkpoints: written by every rank, verified by a manifest, published by one rename.

A checkpoint is the folder `step-N` (N optimizer steps done). While it is being written its name starts with a dot,
so a half-written one is never found; one whose files do not match its manifest is never loaded.

Every rank writes its shards as they lie (masters, the optimizer's moments, what protections gather on their way) and
the layout that says which parameter's elements they are. A reader takes the stretches that it needs from whichever
file holds them, so a run goes on bit for bit with other workers and at another ZeRO stage.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from training.errors import fail
from training.models import hash_file
from training.protection.layout import Fragment, Layout, Sheet, refresh_weights
from training.storage import patiently, settle
from training.workspace import read_json, write_json

MANIFEST = "manifest.json"
_WRITTEN = "written-"
_MASTERS = "masters"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of a worker: an engine, its optimizer and layout, and the protections' own sheets."""

    engine: Any
    optimizer: torch.optim.Optimizer
    layout: Layout
    sheets: Mapping[str, Sheet]


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes: flat tensors by name, the stretches of parameters that they hold, and its random state.

    `fragments` is None for a rank whose state another one writes.
    """

    tensors: dict[str, torch.Tensor]
    fragments: tuple[Fragment, ...] | None
    random: dict[str, Any]


def make_part(folder: Path, part: Path) -> None:
    """An empty folder to write into; what was left half-written goes."""
    for half_written in folder.glob(".step-*.part"):
        shutil.rmtree(half_written, ignore_errors=True)
    part.mkdir(parents=True, exist_ok=True)


def write_rank(part: Path, snapshot: Snapshot, rank: int) -> None:
    """Write a rank's files, then what says that they stand, with their sizes and hashes.

    Storage that fails for a while is waited for; see storage.patiently().
    """
    names = [_random_file(rank)]
    if snapshot.fragments is not None:
        names.append(_shards_file(rank))
        patiently(lambda: _write_shards(part / names[1], snapshot), f"writing {part}")
    patiently(lambda: _write_random_state(part / names[0], snapshot.random), f"writing {part}")
    patiently(lambda: write_json(part / f"{_WRITTEN}{rank:05d}.json", _digests(part, names)), f"writing {part}")


def load_checkpoint(checkpoint: Path, state: State, spec_hash: str) -> int:
    """Restore masters, moments, protections and random state; every rank calls it. The number of steps done.

    Random state is restored where the number of workers is the same, and is left as it is where it is not.

    Raises:
        TenureError: it is of another spec (where it runs may differ).
    """
    manifest = read_json(checkpoint / MANIFEST)
    if manifest["spec_hash"] != spec_hash:
        raise fail("the checkpoint is of another run's spec", str(checkpoint), "resume with the spec it was made with")
    _prepare_moments(state, manifest["scalars"])
    with ExitStack() as stack:
        read = _open_shards(checkpoint, stack)
        for name, sheet in _sheets(state).items():
            state.layout.spread(lambda *stretch, name=name: read(name, *stretch), sheet)
    refresh_weights(state.engine)
    if manifest["workers"] == dist.get_world_size():
        _restore_random_state(checkpoint / _random_file(dist.get_rank()))
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
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return "it has no manifest"
    for name, expected in read_json(manifest)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
            return f"{name} has changed"
    return None


def _sheets(state: State) -> dict[str, Sheet]:
    """Everything that has the shape of the shards, by name: masters, moments, and what protections keep."""
    moments = [state.optimizer.state.get(master, {}) for master in state.layout.masters]
    names = [name for name, value in moments[0].items() if value.shape == state.layout.masters[0].shape]
    sheets = {f"optimizer.{name}": [moment[name] for moment in moments] for name in names}
    return {_MASTERS: list(state.layout.masters), **sheets, **state.sheets}


def scalars_of(state: State) -> dict[str, float]:
    """The optimizer's values that are one for all elements, such as its count of steps."""
    first = state.optimizer.state.get(state.layout.masters[0], {})
    return {name: float(value) for name, value in first.items() if value.numel() == 1}


def _prepare_moments(state: State, scalars: dict[str, float]) -> None:
    """Adam's moments, which are otherwise made at the first step, ready to be filled."""
    fused = bool(state.optimizer.defaults.get("fused"))
    for master in state.layout.masters if scalars else ():
        device = master.device if fused else torch.device("cpu")
        counts = {name: torch.tensor(value, device=device) for name, value in scalars.items()}
        moments = {name: torch.zeros_like(master, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[master] = {**counts, **moments}


def flat_tensors(state: State) -> dict[str, torch.Tensor]:
    """A rank's sheets as one flat tensor a shard, as they lie in memory."""
    return {
        f"{name}/{index}": shard.detach().reshape(-1).contiguous()
        for name, sheet in _sheets(state).items()
        for index, shard in enumerate(sheet)
    }


def _shards_file(rank: int) -> str:
    return f"shards-{rank:05d}.safetensors"


def _write_shards(file: Path, snapshot: Snapshot) -> None:
    """All of a rank's tensors in one file, with the layout in its header."""
    layout = json.dumps([vars(fragment) for fragment in snapshot.fragments or ()])
    save_file({name: tensor.cpu() for name, tensor in snapshot.tensors.items()}, file, metadata={"layout": layout})


def _digests(part: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of files as the disk gives them back; nothing of them is lost with the power."""
    for name in names:
        settle(part / name)
    return {name: {"bytes": (part / name).stat().st_size, "sha256": hash_file(part / name)} for name in names}


def _open_shards(checkpoint: Path, stack: ExitStack) -> Callable[[str, str, int, int], torch.Tensor]:
    """A reader of elements [start, end) of a parameter in a sheet, over the files of all ranks that wrote."""
    held: dict[str, list[tuple[Any, Fragment]]] = {}
    for file in sorted(checkpoint.glob("shards-*.safetensors")):
        opened = stack.enter_context(safe_open(file, "pt"))
        for raw in json.loads(opened.metadata()["layout"]):
            held.setdefault(raw["name"], []).append((opened, Fragment(**raw)))

    def read(sheet: str, name: str, start: int, end: int) -> torch.Tensor:
        whole = torch.empty(end - start)
        for opened, part in held[name]:
            first, last = max(start, part.offset), min(end, part.offset + part.length)
            if first < last:
                shift = part.start - part.offset
                stretch = opened.get_slice(f"{sheet}/{part.shard}")[first + shift : last + shift]
                whole[first - start : last - start] = stretch
        return whole

    return read


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _write_random_state(file: Path, state: dict[str, Any]) -> None:
    with file.open("wb") as stream:
        torch.save(state, stream)


def random_state() -> dict[str, Any]:
    """The state of all generators of this process."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def publish(part: Path, final: Path, about: dict[str, Any]) -> None:
    """Gather what every rank says it wrote into the manifest, then rename; nothing of it is lost with the power."""
    if final.is_dir() and not part.is_dir():
        return  # renamed, before the storage failed
    if not (part / MANIFEST).is_file():  # there is one where the storage failed after it
        told = [read_json(file) for file in sorted(part.glob(f"{_WRITTEN}*.json"))]
        write_json(part / MANIFEST, {**about, "files": {name: kept for one in told for name, kept in one.items()}})
    for file in part.glob(f"{_WRITTEN}*.json"):
        file.unlink(missing_ok=True)
    settle(part / MANIFEST)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    settle(final.parent)


def remove_old(folder: Path, keep: int, best: int = 0) -> None:
    """Keep the newest that are whole, and those of the lowest validation loss; none goes while the newest is not."""
    found = sorted(folder.glob("step-*"))
    whole = [path for path in found if _is_complete(path)]
    if not whole or found[-1] != whole[-1]:
        return
    losses = {path: read_json(path / MANIFEST).get("validation_loss") for path in whole} if best else {}
    judged = sorted((path for path, loss in losses.items() if loss is not None), key=lambda path: (losses[path], path))
    for old in found:
        if old < whole[-keep:][0] and old not in judged[:best]:
            shutil.rmtree(old, ignore_errors=True)


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file is there in its size; contents are hashed when they are written, and when they are read."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    files = {checkpoint / name: told["bytes"] for name, told in read_json(manifest)["files"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())
