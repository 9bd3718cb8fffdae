"""Interpolates between a base and what it was tuned to: theta_alpha = (1 - alpha) theta_0 + alpha theta_tuned.

Source: WiSE-FT, arXiv 2109.01903, equation 1. Whole models are mixed tensor by tensor, one file at a time; of LoRA the
product B A is scaled, which is the same thing, since what it adds is linear in B.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import fail
from training.models import hash_folder
from training.workspace import LINEAGE_FILE, MERGED_FOLDER, read_json, write_json

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
_FIRST, _SECOND = (".lora_A.", ".lora_embedding_A"), (".lora_B.", ".lora_embedding_B")


def check_alpha(alpha: float) -> None:
    """Refuse what is no weight between base and tuned.

    Raises:
        TenureError: it is below 0, above 1 or no number.
    """
    if not 0 <= alpha <= 1:  # nan is neither
        raise fail(f"alpha {alpha:g} is not between 0 and 1", "--alpha", "0 gives the base, 1 the tuned model")


def check_interpolable(tuned: Path) -> None:
    """Refuse an adapter whose effect is not linear in its parameters.

    Raises:
        TenureError: it is of another method than LoRA, or holds more than LoRA's two matrices.
    """
    config = tuned / ADAPTER_CONFIG
    if not config.is_file():
        return
    settings = json.loads(config.read_text(encoding="utf-8"))
    method = str(settings.get("peft_type"))
    if method != "LORA":
        what = f"{method} is not linear in its parameters, so that it cannot be scaled towards the base"
        raise fail(what, str(tuned), "interpolate a run with tuning full, partial or lora")
    if settings.get("use_dora"):
        raise fail("DoRA normalises its weights and is not linear in them", str(tuned), "tune without use_dora")
    if settings.get("modules_to_save") or settings.get("bias", "none") != "none":
        what = "beside LoRA's matrices the adapter replaces whole weights of the base"
        raise fail(what, str(tuned), "tune without modules_to_save and bias")


def interpolate(base: Path, tuned: Path, alpha: float, target: Path) -> Path:
    """Write the artifact between base and tuned, in tuned's form and dtypes, as a folder that is whole or not there.

    At alpha 0 and 1 every stored number is that of base (for LoRA: B is zero) and of tuned, bit for bit.

    Args:
        tuned: an artifact: a whole model with the base's tensors, or a LoRA adapter of the base.

    Raises:
        TenureError: alpha or the adapter does not allow it, or the tensors of base and tuned do not match.
    """
    check_alpha(alpha)
    check_interpolable(tuned)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in tuned.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, part / file.name)
    if (tuned / ADAPTER_CONFIG).is_file():
        _rewrite(tuned, part, lambda name, tensor: scaled(name, tensor, alpha, tuned))
        if (tuned / MERGED_FOLDER).is_dir():
            _merge(base, part)
    else:
        with ExitStack() as stack:
            read = _reader(base, stack)
            _rewrite(tuned, part, lambda name, tensor: mixed(name, tensor, read(name), alpha, base))
    lineage = read_json(tuned / LINEAGE_FILE) if (tuned / LINEAGE_FILE).is_file() else {}
    write_json(part / LINEAGE_FILE, {**lineage, "alpha": alpha, "tuned_hash": hash_folder(tuned)})
    part.rename(target)
    return target


def _rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Every safetensors file with its tensors changed, one file in memory at a time."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: change(name, file.get_tensor(name)).contiguous() for name in file.keys()}  # noqa: SIM118
            save_file(tensors, target / path.name, metadata=file.metadata())


def _reader(folder: Path, stack: ExitStack) -> Callable[[str], torch.Tensor | None]:
    """Reads one tensor of a model by name, from whichever file holds it; None when none does."""
    from safetensors import safe_open

    files: list[Any] = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    holder = dict(_named(files))
    return lambda name: holder[name].get_tensor(name) if name in holder else None


def _named(files: list[Any]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for name in file.keys():  # noqa: SIM118
            yield name, file


def mixed(name: str, tuned: torch.Tensor, base: torch.Tensor | None, alpha: float, folder: Path) -> torch.Tensor:
    """(1 - alpha) base + alpha tuned, computed in at least 32 bits; whole numbers are tuned's."""
    import torch

    if base is None or base.shape != tuned.shape:
        found = "is not there" if base is None else f"has the shape {tuple(base.shape)}"
        what = f"'{name}' of the tuned model has the shape {tuple(tuned.shape)}, and in the base it {found}"
        raise fail(what, str(folder), "save the base again with the transformers version that tuned it")
    if alpha == 1 or not tuned.is_floating_point():
        return tuned
    if alpha == 0:
        return base.to(tuned.dtype)
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return ((1 - alpha) * base.to(wide) + alpha * tuned.to(wide)).to(tuned.dtype)


def scaled(name: str, tensor: torch.Tensor, alpha: float, tuned: Path) -> torch.Tensor:
    """B scaled by alpha, A as it is."""
    if any(part in name for part in _FIRST):
        return tensor
    if not any(part in name for part in _SECOND):
        raise fail(f"'{name}' is neither A nor B of LoRA", str(tuned), "interpolate a run with plain LoRA")
    return tensor if alpha == 1 else tensor * alpha if alpha else tensor.new_zeros(tensor.shape)


def _merge(base: Path, adapter: Path) -> None:
    from training.data.encoding import load_tokenizer
    from training.export import save_merged

    save_merged(base, adapter, adapter / MERGED_FOLDER, load_tokenizer(adapter))
