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

_MANIFEST = "manifest.json"
_MASTERS = "masters"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of a worker: an engine, its optimizer and layout, and the protections' own sheets."""

    engine: Any
    optimizer: torch.optim.Optimizer
    layout: Layout
    sheets: Mapping[str, Sheet]


def save_checkpoint(folder: Path, step: int, state: State, spec_hash: str, keep: int) -> None:
    """Write the state after `step` optimizer steps; every rank calls it. Older ones go only once it stands whole.

    Storage that fails for a while is waited for; see storage.patiently().
    """
    final = folder / f"step-{step:07d}"
    part = folder / f".step-{step:07d}.part"
    if dist.get_rank() == 0:
        for half_written in folder.glob(".step-*.part"):
            shutil.rmtree(half_written, ignore_errors=True)
        patiently(lambda: part.mkdir(parents=True, exist_ok=True), f"making {part}")
    dist.barrier()
    if state.layout.is_sharded or dist.get_rank() == 0:
        patiently(lambda: _write_shards(part, state), f"writing {part}")
    patiently(lambda: _write_random_state(part), f"writing {part}")
    dist.barrier()
    if dist.get_rank() == 0:
        about = {"step": step, "spec_hash": spec_hash, "workers": dist.get_world_size()}
        patiently(lambda: _publish(part, final, {**about, "scalars": _scalars(state)}), f"publishing {final}")
        _remove_old(folder, keep)
    dist.barrier()


def load_checkpoint(checkpoint: Path, state: State, spec_hash: str) -> int:
    """Restore masters, moments, protections and random state; every rank calls it. The number of steps done.

    Random state is restored where the number of workers is the same, and is left as it is where it is not.

    Raises:
        TenureError: it is of another spec (where it runs may differ).
    """
    manifest = read_json(checkpoint / _MANIFEST)
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


def _sheets(state: State) -> dict[str, Sheet]:
    """Everything that has the shape of the shards, by name: masters, moments, and what protections keep."""
    moments = [state.optimizer.state.get(master, {}) for master in state.layout.masters]
    names = [name for name, value in moments[0].items() if value.shape == state.layout.masters[0].shape]
    sheets = {f"optimizer.{name}": [moment[name] for moment in moments] for name in names}
    return {_MASTERS: list(state.layout.masters), **sheets, **state.sheets}


def _scalars(state: State) -> dict[str, float]:
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


def _write_shards(part: Path, state: State) -> None:
    """This rank's sheets in one file, one tensor a shard, with the layout in its header."""
    tensors = {
        f"{name}/{index}": shard.detach().reshape(-1).contiguous().cpu()
        for name, sheet in _sheets(state).items()
        for index, shard in enumerate(sheet)
    }
    layout = json.dumps([vars(fragment) for fragment in state.layout.fragments])
    save_file(tensors, part / f"shards-{dist.get_rank():05d}.safetensors", metadata={"layout": layout})


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


def _write_random_state(part: Path) -> None:
    with (part / _random_file(dist.get_rank())).open("wb") as stream:
        torch.save(_random_state(), stream)


def _random_state() -> dict[str, Any]:
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


def _publish(part: Path, final: Path, about: dict[str, Any]) -> None:
    """Hash what was written as the disk gives it back, then rename; nothing of it is lost with the power."""
    if final.is_dir() and not part.is_dir():
        return  # renamed, before the storage failed
    files = {}
    for file in sorted(part.rglob("*")):
        if file.is_file() and file.name != _MANIFEST:
            settle(file)
            files[str(file.relative_to(part))] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    write_json(part / _MANIFEST, {**about, "files": files})
    settle(part / _MANIFEST)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    settle(final.parent)


def _remove_old(folder: Path, keep: int) -> None:
    """Keep the newest that are whole; none goes as long as the newest of all is not."""
    whole = [path for path in sorted(folder.glob("step-*")) if _is_complete(path)]
    newest = max(folder.glob("step-*"))
    if newest in whole:
        for old in sorted(folder.glob("step-*")):
            if old < whole[-keep:][0]:
                shutil.rmtree(old, ignore_errors=True)


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file is there in its size; contents are hashed when they are written, and when they are read."""
    manifest = checkpoint / _MANIFEST
    if not manifest.is_file():
        return False
    files = {checkpoint / name: told["bytes"] for name, told in read_json(manifest)["files"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())
