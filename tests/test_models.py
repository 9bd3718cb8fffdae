"""Base models: where they are found, and what their files say of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.models import PACKAGED_MODEL, find_model, hash_folder, read_model_info
from training.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace; the current folder is empty too, and the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Workspace.at(tmp_path / "workspace")


def refused(name: str, workspace: Workspace) -> tuple[str, str]:
    """(reason, what to do) for a model that is not to be had."""
    with pytest.raises(ValueError, match=" -> ") as caught:
        find_model(name, workspace)
    what, _, instead = str(caught.value).partition(" -> ")
    return what, instead


def test_sizes_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    info = read_model_info(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert info.linear_shapes == linears
    sizes = (info.architecture, info.hidden_size, info.num_layers, info.max_positions, info.vocab_size)
    assert sizes == ("LlamaForCausalLM", 64, 2, 1024, model.config.vocab_size)


def test_an_untied_head_counts_but_takes_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    info = read_model_info(tmp_path)
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not any("lm_head" in name for name in info.linear_shapes)


def test_a_folder_is_found_as_given_and_from_the_current_folder(tiny_model: Path, workspace: Workspace) -> None:
    assert find_model(str(tiny_model), workspace) == tiny_model
    shutil.copytree(tiny_model, "copy")
    assert find_model("copy", workspace) == Path("copy").absolute()


def test_the_packaged_model_is_found_where_fetch_puts_it(workspace: Workspace, tiny_model: Path) -> None:
    what, instead = refused(PACKAGED_MODEL, workspace)
    assert what == f"the packaged model '{PACKAGED_MODEL}' has not been fetched"
    assert instead == "run: tenure fetch"
    shutil.copytree(tiny_model, workspace.models / PACKAGED_MODEL)
    assert find_model(PACKAGED_MODEL, workspace) == workspace.models / PACKAGED_MODEL


def test_folders_that_hold_no_model_are_refused(workspace: Workspace, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused("empty", workspace)[0] == "'empty' holds no config.json"
    (tmp_path / "pickled").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    assert refused("pickled", workspace)[0] == "'pickled' holds no *.safetensors"
    assert refused("./nowhere", workspace)[0] == f"there is no folder {tmp_path / 'nowhere'}"


@pytest.mark.parametrize(
    ("file", "kept", "what"),
    [
        ("config.json", 20, "is not a JSON object"),
        ("model.safetensors", 0, "is cut short or damaged"),
        ("model.safetensors", 5, "is cut short or damaged"),
        ("model.safetensors", 100, "is cut short or damaged"),
        ("model.safetensors", -1, "is cut short or damaged"),
    ],
)
def test_a_damaged_model_is_refused(tiny_model: Path, workspace: Workspace, file: str, kept: int, what: str) -> None:
    shutil.copytree(tiny_model, "copy")
    damaged = Path("copy").absolute() / file
    damaged.write_bytes(damaged.read_bytes()[:kept])
    assert refused("copy", workspace) == (f"{damaged} {what}", "save or fetch the model again")


def test_bytes_that_are_no_header_are_refused(tiny_model: Path, workspace: Workspace) -> None:
    shutil.copytree(tiny_model, "copy")
    Path("copy/model.safetensors").write_bytes(b"\xff" * 100)
    assert "is cut short or damaged" in refused("copy", workspace)[0]
    Path("copy/model.safetensors").write_bytes((20).to_bytes(8, "little") + b"\xff" * 100)
    assert "is cut short or damaged" in refused("copy", workspace)[0]


@pytest.mark.parametrize("name", ["some/model", "smollm2-135m-instrukt"])
def test_a_hub_id_that_is_not_on_disk_is_refused_offline(workspace: Workspace, name: str) -> None:
    what, instead = refused(name, workspace)
    assert what.startswith(f"model '{name}' is not on disk and no hub gave it (")
    assert instead.endswith(f"give a local folder, a hub id, or '{PACKAGED_MODEL}'")
    assert ("did you mean" in instead) == name.startswith("smollm2")


@pytest.mark.parametrize("name", ["a/b/c", "what a model", "model?", "-/-"])
def test_a_name_that_can_be_no_hub_id_is_refused_without_asking(workspace: Workspace, name: str) -> None:
    assert refused(name, workspace)[0] == f"'{name}' is no folder and no hub id"


def test_a_models_hash_follows_the_contents_of_the_files_that_decide(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert hash_folder(copy) == hash_folder(tiny_model)
    (copy / "README.md").write_text("a note")
    assert hash_folder(copy) == hash_folder(tiny_model)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    changed = hash_folder(copy)
    assert changed != hash_folder(tiny_model)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert hash_folder(copy) not in (changed, hash_folder(tiny_model))
