"""The importance of a model's weights: a versioned artifact, computed once, shared by runs, chained from task to task.

A folder with `importance.safetensors`, one fp32 tensor a parameter under the parameter's own name and in its shape,
and `importance.json`, which says of which model it is, how it was estimated and on what. Reading the latter, and
judging whether it fits a run, needs no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import Problem, TenureError, fail, raise_all
from training.models import hash_folder, read_shapes
from training.spec import RunSpec
from training.strategy import Ewc, Si, updates_coupled
from training.workspace import write_json

if TYPE_CHECKING:
    import torch

    from training.protection.layout import Layout, Reader, Sheet

VERSION = 1
IMPORTANCE_FOLDER = "importance"
INFO_FILE = "importance.json"
TENSORS_FILE = "importance.safetensors"
PATH_INTEGRAL = "path_integral"
ESTIMATORS = {Ewc: ("exact", "empirical"), Si: (PATH_INTEGRAL,)}


@dataclass(frozen=True)
class ImportanceInfo:
    """What an importance was estimated from, and its size.

    Attributes:
        base_hash: of the model whose weights are the anchor, see models.hash_folder().
        estimator: Fisher information, `exact` (labels drawn from the model) or `empirical` (the data's own), or
            `path_integral` (synaptic intelligence).
        reduction: how a sequence's loss was reduced over its target tokens before its gradient was squared.
        tasks: how many tasks' importances are added up in it, the earlier ones times `gamma` each time.
        trace, maximum: over all elements; negative ones, which only `path_integral` has, count as 0.
    """

    base_hash: str
    estimator: str
    examples: int
    reduction: str
    data_hash: str
    tasks: int
    gamma: float
    trace: float
    maximum: float
    elements: int
    version: int = VERSION

    @property
    def mean(self) -> float:
        return self.trace / self.elements

    def factor(self, normalise: str) -> float:
        """What makes the mean or the maximum 1."""
        return {"mean": 1 / self.mean, "max": 1 / self.maximum, "none": 1.0}[normalise]


def read_info(folder: Path) -> ImportanceInfo:
    """What the artifact in a folder says of itself.

    Raises:
        TenureError: it is damaged, of another version, or zero everywhere.
    """
    again = "compute it again: tenure importance compute"
    try:
        info = ImportanceInfo(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise fail(f"the importance cannot be read: {reason}", str(folder / INFO_FILE), again) from None
    if info.version != VERSION:
        raise fail(f"the importance is of version {info.version}, not {VERSION}", str(folder), again)
    if info.trace <= 0:
        raise fail("the importance is zero everywhere, so it protects nothing", str(folder), "give more or other data")
    return info


def check_importances(spec: RunSpec) -> None:
    """Refuse importances in a spec that are not of its model, and strengths that its steps cannot bear.

    Raises:
        TenureError: with every fault.
    """
    problems: list[Problem] = []
    for index, protection in enumerate(spec.protections):
        if isinstance(protection, Ewc | Si):
            for key in ("importance", "previous"):
                folder = getattr(protection, key, None)
                if folder is not None:
                    where = f"protections[{index}].{key}"
                    problems += _misfits(folder, protection, spec, where, is_anchored=key == "importance")
            if protection.importance and not problems:
                problems += unbearable(protection, read_info(protection.importance), spec)
    raise_all(problems)


def _misfits(folder: Path, protection: Ewc | Si, spec: RunSpec, where: str, *, is_anchored: bool) -> list[Problem]:
    """What keeps an importance from protecting the spec's model. One that is only added may be of an earlier model."""
    info, base = read_info(folder), Path(spec.model)
    if info.estimator not in ESTIMATORS[type(protection)]:
        known = " or ".join(ESTIMATORS[type(protection)])
        return [Problem(f"{folder} was estimated as '{info.estimator}'", where, f"{protection.type} wants {known}")]
    shapes, wanted = read_shapes(folder / TENSORS_FILE), _shapes_of(base)
    other = sorted(
        name for name in shapes.keys() | wanted.keys() if name in shapes and shapes[name] != wanted.get(name)
    )
    if other:
        name = other[0]
        what = f"{folder} is of other shapes: {name} is {shapes[name]} there and {wanted.get(name)} in the model"
        return [Problem(what, where, "compute it on this model")]
    if is_anchored and info.base_hash != hash_folder(base):
        what = f"{folder} is of another model than {base}"
        return [Problem(what, where, "compute it on this model, or set model to the one it was computed on")]
    return []


def _shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        shapes |= read_shapes(file)
    return shapes


def unbearable(protection: Ewc | Si, info: ImportanceInfo, spec: RunSpec) -> list[Problem]:
    """A strength at which an explicit step overshoots the anchor by more than it was away: eta s w_max >= 2."""
    if not updates_coupled(protection, spec.tuning) or spec.tuning.type == "lora":
        return []
    largest = info.maximum * info.factor(protection.normalise) * (2 if isinstance(protection, Si) else 1)
    product = spec.training.learning_rate * protection.strength * largest
    if product < 2:
        return []
    most = 2 / (spec.training.learning_rate * largest)
    what = f"the explicit step diverges: learning rate x strength x largest importance is {product:.3g}, not below 2"
    where = f"protections: {protection.type}"
    return [Problem(what, where, f"set update: proximal, or strength below {most:.3g}")]


@contextmanager
def open_importance(folder: Path) -> Iterator[Reader]:
    """A reader of stretches of its parameters.

    Raises:
        TenureError: when a parameter is asked for that it does not have.
    """
    from safetensors import safe_open

    with safe_open(folder / TENSORS_FILE, "pt") as file:
        names = set(file.keys())

        def read(name: str, start: int, end: int) -> torch.Tensor:
            if name not in names:
                raise _lacks(name, folder)
            rows = file.get_slice(name)
            shape = rows.get_shape()
            size = max(1, _product(shape[1:]))
            first, last = start // size, -(-end // size)
            stretch: torch.Tensor = rows[first:last].reshape(-1)[start - first * size : end - first * size]
            return stretch

        yield read


def importance_sheet(folder: Path, layout: Layout) -> Sheet:
    """This rank's stretches of an importance, as they were written."""
    sheet = layout.zeros()
    with open_importance(folder) as read:
        layout.spread(read, sheet)
    return sheet


def whole_importance(folder: Path, name: str) -> torch.Tensor:
    """The importance of one whole weight.

    Raises:
        TenureError: it has none.
    """
    from safetensors import safe_open

    with safe_open(folder / TENSORS_FILE, "pt") as file:
        if name not in file.keys():  # noqa: SIM118
            raise _lacks(name, folder)
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _lacks(name: str, folder: Path) -> TenureError:
    return fail(f"the importance has nothing for '{name}'", str(folder), "compute it on this model")


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def write_importance(folder: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> ImportanceInfo:
    """Write an artifact that is complete or not there. `about` has the fields of ImportanceInfo that are not counted.

    Raises:
        TenureError: an element is not a finite number.
    """
    from safetensors.torch import save_file

    kept = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in kept.items() if not tensor.isfinite().all()]
    if broken:
        raise fail(
            f"the importance of '{broken[0]}' is not a finite number", str(folder), "set training.precision: fp32"
        )
    info = ImportanceInfo(
        **about,
        trace=sum(tensor.clamp(min=0).sum(dtype=_float64()).item() for tensor in kept.values()),
        maximum=max(tensor.max().item() for tensor in kept.values()),
        elements=sum(tensor.numel() for tensor in kept.values()),
    )
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(kept, part / TENSORS_FILE)
    write_json(part / INFO_FILE, asdict(info))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return info


def _float64() -> torch.dtype:
    import torch

    return torch.float64
