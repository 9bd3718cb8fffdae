"""Importance artifacts: what fits a run, what is refused before anything starts, and how they come about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from jobs import write_spec
from safetensors.torch import load_file
from tiny import make_tiny_model

from cluster.cli import cli
from cluster.importance import print_importance
from cluster.pipeline import read_spec
from training.errors import TenureError
from training.models import hash_folder
from training.protection.importance import INFO_FILE, TENSORS_FILE, open_importance, read_info, write_importance
from training.protection.passes import ready_importances
from training.stages import plan_run
from training.tuning import load_base
from training.workspace import Workspace


def write(folder: Path, model: Path, **other: Any) -> Path:
    """An importance of ones for a model; what is in `other` is laid over what is true."""
    named = dict(load_base(model, torch.float32).named_parameters())
    about = {"base_hash": hash_folder(model), "estimator": "exact", "examples": 4, "reduction": "sum"}
    about |= {"data_hash": "d", "tasks": 1, "gamma": 1.0}
    write_importance(folder, {name: torch.ones_like(value) for name, value in named.items()}, {**about, **other})
    return folder


def refused(folder: Path, model: Path, protection: dict[str, Any], **other: Any) -> str:
    """What `tenure train` says of a spec with this protection, before Ray starts."""
    other = {"tuning": {"type": "full"}} | other
    path = write_spec(folder, model, protections=[protection], **other)
    workspace = Workspace.at(folder / "workspace")
    with pytest.raises(TenureError) as caught:
        plan_run(read_spec(path, workspace), workspace)
    assert not workspace.runs.exists()
    return str(caught.value)


def test_a_fitting_importance_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    importance = write(tmp_path / "ones", tiny_model)
    protection = {"type": "ewc", "strength": 1.0, "importance": str(importance)}
    path = write_spec(tmp_path / "run", tiny_model, tuning={"type": "full"}, protections=[protection])
    workspace = Workspace.at(tmp_path / "workspace")
    plan_run(read_spec(path, workspace), workspace)


def test_importance_of_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=9)
    protection = {"type": "ewc", "strength": 1.0, "importance": str(write(tmp_path / "ones", other))}
    told = refused(tmp_path / "run", tiny_model, protection)
    assert "protections[0].importance" in told
    assert f"is of another model than {tiny_model}" in told


def test_importance_of_other_shapes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    importance = write(tmp_path / "ones", tiny_model)
    tensors = load_file(importance / TENSORS_FILE)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = torch.ones(3, 3)
    info = vars(read_info(importance))
    about = {
        key: info[key] for key in ("base_hash", "estimator", "examples", "reduction", "data_hash", "tasks", "gamma")
    }
    write_importance(importance, tensors, about)
    protection = {"type": "ewc", "strength": 1.0, "importance": str(importance)}
    told = refused(tmp_path / "run", tiny_model, protection)
    assert f"{name} is (3, 3) there and (64, 64) in the model" in told


@pytest.mark.parametrize(
    ("kind", "estimator", "wanted"),
    [
        ("ewc", "guessed", "exact or empirical"),
        ("ewc", "path_integral", "exact or empirical"),
        ("si", "exact", "path_integral"),
    ],
)
def test_an_estimator_that_the_protection_does_not_know_is_refused(
    tiny_model: Path, tmp_path: Path, kind: str, estimator: str, wanted: str
) -> None:
    importance = write(tmp_path / "ones", tiny_model, estimator=estimator)
    told = refused(tmp_path / "run", tiny_model, {"type": kind, "strength": 1.0, "importance": str(importance)})
    assert f"was estimated as '{estimator}'" in told
    assert f"{kind} wants {wanted}" in told


@pytest.mark.parametrize("normalise", ["mean", "none"])
def test_a_strength_that_makes_the_explicit_step_diverge_is_refused(
    tiny_model: Path, tmp_path: Path, normalise: str
) -> None:
    importance = str(write(tmp_path / "ones", tiny_model))
    protection = {"type": "ewc", "strength": 3000.0, "importance": importance, "normalise": normalise}
    told = refused(tmp_path / "run", tiny_model, protection | {"update": "coupled"})
    assert "the explicit step diverges: learning rate x strength x largest importance is 3, not below 2" in told
    assert "set update: proximal, or strength below 2e+03" in told
    path = write_spec(tmp_path / "fine", tiny_model, tuning={"type": "full"}, protections=[protection])
    workspace = Workspace.at(tmp_path / "workspace")
    plan_run(read_spec(path, workspace), workspace)


@pytest.mark.parametrize(
    ("content", "what"),
    [("{", "cannot be read"), ('{"version": 1}', "cannot be read"), (None, "is of version 99")],
)
def test_a_damaged_or_later_artifact_is_told(tiny_model: Path, tmp_path: Path, content: str | None, what: str) -> None:
    importance = write(tmp_path / "ones", tiny_model)
    later = json.dumps({**json.loads((importance / INFO_FILE).read_text()), "version": 99})
    (importance / INFO_FILE).write_text(content or later)
    told = refused(tmp_path / "run", tiny_model, {"type": "ewc", "strength": 1.0, "importance": str(importance)})
    assert what in told
    assert "tenure importance compute" in told


@pytest.mark.parametrize(
    ("protection", "what"),
    [
        ({"type": "ewc", "strength": -1.0, "data": []}, "-1.0 is not a number above 0"),
        ({"type": "ewc", "strength": 1.0}, "ewc needs the importance of the weights"),
        ({"type": "ewc", "strength": 1.0, "importance": "nowhere"}, "holds no importance.json"),
        ({"type": "si", "strength": 1.0}, "si has no earlier path to protect"),
        ({"type": "l2sp", "strength": 0.0}, "0.0 is not a number above 0"),
    ],
)
def test_a_protection_without_what_it_needs_is_refused(
    tiny_model: Path, tmp_path: Path, protection: dict[str, Any], what: str
) -> None:
    assert what in refused(tmp_path, tiny_model, protection)


@pytest.mark.parametrize(
    ("tuning", "protection", "what"),
    [
        ({"type": "lora"}, {"type": "l2sp", "strength": 1.0, "update": "proximal"}, "has no proximal step"),
        ({"type": "lora"}, {"type": "si", "strength": 1.0, "record": True}, "records the path of whole weights"),
    ],
)
def test_a_pull_that_the_tuning_cannot_have_is_refused(
    tiny_model: Path, tmp_path: Path, tuning: dict[str, Any], protection: dict[str, Any], what: str
) -> None:
    assert what in refused(tmp_path, tiny_model, protection, tuning=tuning)


def test_stretches_are_read_across_rows(tiny_model: Path, tmp_path: Path) -> None:
    values = torch.arange(24.0).view(4, 6) + 1
    about = {"base_hash": "", "estimator": "exact", "examples": 1, "reduction": "sum", "data_hash": "", "tasks": 1}
    write_importance(tmp_path / "one", {"w": values, "b": torch.ones(5)}, {**about, "gamma": 1.0})
    with open_importance(tmp_path / "one") as read:
        assert read("w", 4, 15).tolist() == values.flatten()[4:15].tolist()
        assert read("b", 2, 5).tolist() == [1, 1, 1]
        with pytest.raises(TenureError, match="has nothing for 'c'"):
            read("c", 0, 1)


def test_an_importance_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TenureError, match="importance of 'w' is not a finite number"):
        write_importance(tmp_path / "one", {"w": torch.tensor([1.0, float("inf")])}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def computed(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """EWC's and SI's importance computed by a spec's own data, twice, and then one chained to the first."""
    folder = tmp_path_factory.mktemp("computed")
    data = [{"path": "sentences.jsonl", "text": "text"}]
    ewc = {"type": "ewc", "strength": 1.0, "data": data, "examples": 5}
    si = {"type": "si", "strength": 1.0, "data": data, "steps": 4, "learning_rate": 1e-3, "xi": 1e-6}
    workspace = Workspace.at(folder / "workspace")

    def ready(protections: list[dict[str, Any]]) -> dict[str, str]:
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        path = write_spec(folder, tiny_model, protections=protections, scaling={"workers": 2, "zero_stage": 2})
        return ready_importances(read_spec(path, workspace), workspace, logs, None)

    first = ready([ewc, si])
    times = {name: Path(path, INFO_FILE).stat().st_mtime_ns for name, path in first.items()}
    again = ready([ewc, si])
    chained = ready([{**ewc, "previous": first["ewc"], "gamma": 0.5}])
    return {"first": first, "times": times, "again": again, "chained": chained}


def test_importance_is_computed_once(computed: dict[str, Any], tiny_model: Path) -> None:
    assert computed["again"] == computed["first"]
    for name, path in computed["first"].items():
        assert Path(path, INFO_FILE).stat().st_mtime_ns == computed["times"][name]
        info = read_info(Path(path))
        assert info.base_hash == hash_folder(tiny_model)
        assert info.elements == sum(value.numel() for value in load_base(tiny_model, torch.float32).parameters())
    assert read_info(Path(computed["first"]["ewc"])).estimator == "exact"
    assert read_info(Path(computed["first"]["si"])).estimator == "path_integral"


def test_a_chain_adds_the_earlier_importance_times_gamma(computed: dict[str, Any]) -> None:
    first = load_file(Path(computed["first"]["ewc"]) / TENSORS_FILE)
    chained = load_file(Path(computed["chained"]["ewc"]) / TENSORS_FILE)
    assert all(torch.allclose(chained[name], 1.5 * value, rtol=1e-4) for name, value in first.items())
    assert read_info(Path(computed["chained"]["ewc"])).tasks == 2


def test_show_says_what_it_is(computed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_importance(Path(computed["chained"]["ewc"]))
    told = capsys.readouterr().out
    assert "exact, over 5 examples" in told
    assert "2 (earlier ones times 0.5)" in told
    assert "model.embed_tokens.weight" in told


def test_compute_refuses_a_spec_without_need(tiny_model: Path, tmp_path: Path) -> None:
    path = write_spec(tmp_path, tiny_model)
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path / "w"), "importance", "compute", str(path)])
    assert isinstance(result.exception, TenureError)
    assert "no protection of this spec needs an importance" in str(result.exception)
    assert yaml.safe_load(path.read_text())["protections"] == []
