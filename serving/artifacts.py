"""Whether an artifact can be served, by its files alone: safetensors only, whole, and meant for its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import Problem, TenureError
from training.models import read_shapes

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_ADAPTER_PREFIX = "base_model.model."
_AGAIN = "restore it, or train again"


def artifact_problems(folder: Path, base: Path) -> list[Problem]:
    """Everything that speaks against serving the artifact in a folder: an adapter of `base`, or a whole model."""
    if not folder.is_dir():
        return [Problem("there is no artifact", str(folder), _AGAIN)]
    problems = list(_pickled(folder))
    try:
        problems += _adapter(folder, base) if (folder / "adapter_config.json").is_file() else _model(folder, base)
    except (OSError, ValueError, KeyError, TenureError) as error:
        problems.append(Problem(f"the artifact cannot be read: {error}", str(folder), _AGAIN))
    return problems


def _pickled(folder: Path) -> Iterator[Problem]:
    for pattern in PICKLED:
        for file in sorted(folder.glob(pattern)):
            yield Problem("pickled weights can run code when they are loaded", str(file), "keep safetensors alone")


def _adapter(folder: Path, base: Path) -> Iterator[Problem]:
    """Every pair of A and B must fit a weight of the base, and the rank of the config."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = _tensors(folder)
    if not tensors:
        yield Problem("the adapter holds no tensors", str(folder), _AGAIN)
    known = _tensors(base)
    halves = {name: shape for name, shape in tensors.items() if ".lora_A." in name or ".lora_B." in name}
    for name, shape in sorted(halves.items()):
        module = name.removeprefix(_ADAPTER_PREFIX).split(".lora_")[0]
        weight = known.get(f"{module}.weight")
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if weight is None:
            what = f"the adapter changes {module}, which the base {base.name} does not have: it is for another base"
            yield Problem(what, str(folder), "give the base that it was trained on")
            return
        if other not in tensors:
            yield Problem(f"the adapter lacks {other}", str(folder), _AGAIN)
        elif not _fits(name, shape, weight, int(config["r"])):
            what = f"{name} has the shape {list(shape)}, which does not fit the base's {list(weight)}"
            yield Problem(what, str(folder), "give the base that it was trained on")
            return


def _fits(name: str, shape: tuple[int, ...], weight: tuple[int, ...], rank: int) -> bool:
    """A is [rank, in] and B [out, rank] of a weight [out, in]; ranks may differ by module."""
    if len(shape) != 2 or len(weight) != 2:
        return len(shape) == len(weight)
    return shape[1] == weight[1] if ".lora_A." in name else shape[0] == weight[0]


def _model(folder: Path, base: Path) -> Iterator[Problem]:
    """A whole model has the base's tensors in their shapes; an output head tied to the embedding may be left out."""
    tensors, known = _tensors(folder), _tensors(base)
    may_lack = {"lm_head.weight"}
    for name in sorted(set(known) - set(tensors) - may_lack):
        yield Problem(f"the artifact lacks the tensor {name}", str(folder), _AGAIN)
    for name in sorted(set(tensors) - set(known) - may_lack):
        yield Problem(f"the artifact holds {name}, a tensor that the base does not have", str(folder), _AGAIN)
    for name in sorted(set(tensors) & set(known)):
        if tensors[name] != known[name]:
            what = f"{name} has the shape {list(tensors[name])}, in the base it is {list(known[name])}"
            yield Problem(what, str(folder), "give the base that it was tuned from")


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, by name; of an index every file that it names."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        told: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        files = sorted({folder / name for name in told["weight_map"].values()})
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= read_shapes(file)
    return found
