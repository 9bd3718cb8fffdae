"""WiSE-FT: weights between base and tuned, the curve of their scores, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command
from conftest import WholeRun
from jobs import plan_of, run_of, start_job, train_here
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_tiny_adapter, make_tiny_model
from transformers import AutoModelForCausalLM

from training.data.encoding import load_tokenizer
from training.errors import TenureError
from training.evaluation.scorecard import SuiteScore, Verdict, read_scorecard
from training.export import save_merged
from training.interpolate import interpolate
from training.models import hash_folder
from training.reporting.wise import WiseCurve, WisePoint, find_best, find_knee, joined, read_curve
from training.workspace import MERGED_FOLDER, read_json

Tensors = dict[str, torch.Tensor]


def tensors(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def saved(folder: Path, seed: int, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """A tiny whole model in a dtype, in files of a size."""
    made = make_tiny_model(folder / "whole", seed)
    model = AutoModelForCausalLM.from_pretrained(made).to(dtype)
    model.save_pretrained(folder / "stored", max_shard_size=shard)
    for file in made.iterdir():
        if not (folder / "stored" / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / "stored" / file.name)
    return folder / "stored"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ends_are_base_and_tuned_bit_for_bit_and_the_middle_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned = saved(tmp_path / "base", 0, dtype, "50KB"), saved(tmp_path / "tuned", 1, dtype, "100KB")
    assert len(list(tuned.glob("*.safetensors"))) > 1
    assert len(list(base.glob("*.safetensors"))) > len(list(tuned.glob("*.safetensors")))
    before, after = tensors(base), tensors(tuned)
    for alpha in (0.0, 0.3, 1.0):
        given = tensors(interpolate(base, tuned, alpha, tmp_path / f"at-{alpha}"))
        assert given.keys() == after.keys()
        for name, tensor in given.items():
            assert tensor.dtype == dtype
            if alpha in (0.0, 1.0):
                assert torch.equal(tensor, (after if alpha else before)[name])
            else:
                wanted = 0.7 * before[name].double() + 0.3 * after[name].double()
                assert torch.allclose(tensor.double(), wanted, atol=1e-7 if dtype == torch.float32 else 5e-3)
    assert {file.name for file in (tmp_path / "at-0.3").iterdir()} == {f.name for f in tuned.iterdir()} | {
        "tenure.json"
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "at-1.0")
    assert torch.equal(loaded.get_input_embeddings().weight, after["model.embed_tokens.weight"])
    lineage = read_json(tmp_path / "at-0.3" / "tenure.json")
    assert lineage == {"alpha": 0.3, "tuned_hash": hash_folder(tuned)}


def test_of_lora_the_product_is_scaled(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_adapter(tiny_model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.save_pretrained(adapter)
    save_merged(tiny_model, adapter, adapter / MERGED_FOLDER, tokenizer)

    def folded(folder: Path) -> Tensors:
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
        merged = PeftModel.from_pretrained(fresh, str(folder)).merge_and_unload()
        return {name: parameter.detach() for name, parameter in merged.named_parameters()}

    start, end = dict(base.named_parameters()), folded(adapter)
    for alpha in (0.0, 0.4, 1.0):
        scaled = interpolate(tiny_model, adapter, alpha, tmp_path / f"at-{alpha}")
        given = folded(scaled)
        for name, tensor in given.items():
            wanted = (1 - alpha) * start[name].detach() + alpha * end[name]
            assert torch.allclose(tensor, wanted, atol=1e-6)
        assert max((given[n] - start[n].detach()).abs().max().item() for n in given) >= 0.01 * alpha
        for name, tensor in tensors(scaled / MERGED_FOLDER).items():
            assert torch.equal(tensor, given[name])
    assert all(torch.equal(tensors(tmp_path / "at-1.0")[name], tensor) for name, tensor in tensors(adapter).items())
    assert all(not tensor.any() for name, tensor in tensors(tmp_path / "at-0.0").items() if "lora_B" in name)


def changed_config(adapter: Path, **settings: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


def test_what_is_not_linear_or_does_not_match_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_adapter(tiny_model, tmp_path / "adapter")
    target = tmp_path / "target"
    for settings, why in (
        ({"peft_type": "IA3"}, "IA3 is not linear in its parameters"),
        ({"peft_type": "LORA", "use_dora": True}, "DoRA normalises its weights"),
        ({"use_dora": False, "modules_to_save": ["lm_head"]}, "replaces whole weights"),
    ):
        with pytest.raises(TenureError, match=why):
            interpolate(tiny_model, changed_config(adapter, **settings), 0.5, target)
    for alpha in (-0.1, 1.01, float("nan"), float("inf")):
        with pytest.raises(TenureError, match="is not between 0 and 1"):
            interpolate(tiny_model, tiny_model, alpha, target)
    larger = tmp_path / "larger"
    shutil.copytree(tiny_model, larger)
    whole = tensors(tiny_model)
    save_file(whole | {"model.norm.weight": torch.ones(65)}, larger / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TenureError, match=r"'model.norm.weight' of the tuned model has the shape \(65,\)"):
        interpolate(tiny_model, larger, 0.5, target)
    assert not target.exists()


# ---------------------------------------------------------------------------------------------- protection


@pytest.mark.parametrize("tuning", [{"type": "full"}, {"type": "lora", "rank": 4, "alpha": 8}], ids=lambda t: t["type"])
def test_the_protection_exports_the_middle_and_keeps_what_was_tuned(
    one_process: None, tiny_model: Path, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    training = {"max_steps": 3, "validate_every_steps": 0, "checkpoint_every_steps": 0, "learning_rate": 1e-2}
    keys: dict[str, Any] = {"tuning": tuning, "training": training}
    plain = start_job(tmp_path / "plain", tiny_model, **keys)
    wise = start_job(tmp_path / "wise", tiny_model, protections=[{"type": "wise", "alpha": 0.25}], **keys)
    for job in (plain, wise):
        train_here(job)
    run = run_of(wise)
    tuned, artifact = tensors(run.tuned), tensors(run.artifact)
    assert all(torch.equal(tuned[name], tensor) for name, tensor in tensors(run_of(plain).artifact).items())
    base = tensors(tiny_model)
    for name, tensor in artifact.items():
        if tuning["type"] == "full":
            assert torch.allclose(tensor, 0.75 * base[name] + 0.25 * tuned[name], atol=1e-7)
        else:
            assert torch.equal(tensor, tuned[name] * (0.25 if "lora_B" in name else 1.0))
    lineage = read_json(run.artifact / "tenure.json")
    assert (lineage["alpha"], lineage["tuned_hash"], lineage["run"]) == (0.25, hash_folder(run.tuned), run.id)
    shutil.rmtree(run.artifact)
    stood = (run.tuned / "tenure.json").stat().st_mtime_ns
    train_here(wise)
    assert all(torch.equal(tensors(run.artifact)[name], tensor) for name, tensor in artifact.items())
    assert (run.tuned / "tenure.json").stat().st_mtime_ns == stood, "a resumed run interpolates what stands"


def test_a_run_that_keeps_two_copies_plans_the_disk_for_them(tiny_model: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"tuning": {"type": "full"}}
    plain = plan_of(start_job(tmp_path / "plain", tiny_model, **keys))
    wise = plan_of(start_job(tmp_path / "wise", tiny_model, protections=[{"type": "wise", "alpha": 0.5}], **keys))
    assert wise.disk_bytes - plain.disk_bytes == 4 * plain.model_parameters
    assert wise.memory_per_worker_bytes == plain.memory_per_worker_bytes


# --------------------------------------------------------------------------------------------------- curve


def suite(name: str, role: Any, change: float) -> SuiteScore:
    return SuiteScore(
        name=name,
        role=role,
        metric="exact_match",
        higher_is_better=True,
        unit="share",
        base=0.5,
        tuned=0.5 + change,
        change=change,
        interval=(change, change),
        threshold=0.0,
        kept=True,
        items=(),
    )


def point(alpha: float, gain: float, loss: float, kept: bool = True) -> WisePoint:
    verdict = Verdict(verdict="kept" if kept else "broken", min_gain=0.0, max_loss=0.02, reasons=())
    suites = (suite("new", "target", gain), suite("old", "retention", -loss))
    return WisePoint(alpha=alpha, artifact="", artifact_hash="", suites=suites, contract=verdict)


def test_the_knee_is_where_most_is_gained_for_least_lost() -> None:
    points = [point(0, 0, 0), point(0.25, 0.2, 0.01), point(0.5, 0.35, 0.03), point(1, 0.4, 0.2)]
    # shares of the gain less those of the loss: 0.45, 0.725
    assert find_knee(points) == 0.5
    straight = [point(0, 0, 0), point(0.5, 0.2, 0.1), point(1, 0.4, 0.2)]
    assert find_knee(straight) is None
    assert find_knee([point(0, 0, 0), point(0.5, 0.2, 0), point(1, 0.4, 0)]) is None, "nothing is lost"
    assert find_knee(points[:1]) is None


def test_the_best_alpha_gains_most_of_those_that_keep_the_contract() -> None:
    points = [point(0, 0, 0), point(0.25, 0.2, 0.01), point(0.5, 0.35, 0.03, kept=False), point(1, 0.4, 0.2, False)]
    assert find_best(points) == 0.25
    assert find_best([point(0, 0.1, 0), point(1, 0.1, 0)]) == 0.0
    assert find_best([point(0, 0, 0, kept=False)]) is None


def test_a_curve_keeps_earlier_alphas_of_the_same_models_and_protocol() -> None:
    def curve(protocol: str, *points: WisePoint) -> WiseCurve:
        return WiseCurve(
            run="r", protocol_hash=protocol, base_hash="b", tuned_hash="t", points=points, knee=None, best=None
        )

    later = curve("p", point(0.5, 0.3, 0.01))
    both = joined(later, curve("p", point(0, 0, 0), point(0.5, 0.1, 0.1), point(1, 0.4, 0.2)))
    assert [(p.alpha, p.suites[0].change) for p in both.points] == [(0, 0), (0.5, 0.3), (1, 0.4)]
    assert (both.knee, both.best) == (0.5, 1)
    assert joined(later, curve("q", point(0, 0, 0))) == later
    assert joined(later, None) == later


# ------------------------------------------------------------------------------------------------- command


def test_the_command_scores_alphas_and_reuses_what_stands(kept_run: WholeRun) -> None:
    run, root = kept_run.run, kept_run.workspace.root

    def printed(*arguments: str) -> str:
        command = Command.start("interpolate", run.id, *arguments, workspace=root)
        assert command.finish() == 0, command.err
        assert command.err == ""
        _, alive = psutil.wait_procs(command.survivors(), timeout=20)
        assert alive == []
        return command.out

    before = hash_folder(run.artifact)
    told = printed("--alpha", "0.5", "--alpha", "1")
    assert "sums" in told
    assert "✓ kept" in told
    assert str(run.wise_curve) in told
    curve = read_curve(run.wise_curve)
    assert curve is not None
    assert [p.alpha for p in curve.points] == [0.5, 1.0]
    card = read_scorecard(run.scorecard)
    assert [s.tuned for s in curve.points[1].suites] == [s.tuned for s in card.suites]
    assert curve.points[1].artifact == str(run.artifact)
    middle = tensors(run.wise / "alpha-0.5")
    for name, tensor in tensors(run.artifact).items():
        assert torch.equal(middle[name], tensor * (0.5 if "lora_B" in name else 1.0))
    scored = (run.logs / "score-alpha-0.5.log").stat().st_mtime_ns
    printed("--alpha", "0", "--alpha", "0.5")
    curve = read_curve(run.wise_curve)
    assert curve is not None
    assert [p.alpha for p in curve.points] == [0.0, 0.5, 1.0]
    assert [s.change for s in curve.points[0].suites] == [0.0, 0.0]
    losses = [p.suites[1].tuned for p in curve.points]
    assert len(set(losses)) == 3
    assert (run.logs / "score-alpha-0.5.log").stat().st_mtime_ns == scored
    assert not list(run.logs.glob("score-alpha-[01].0.log")), "base and tuned were scored by the run itself"
    page = run.report.read_text(encoding="utf-8")
    assert "Between base and tuned" in page
    assert hash_folder(run.artifact) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny-1", "--alpha", "1.5"], "alpha 1.5 is not between 0 and 1"),
        (["tiny-1", "--alpha", "nan"], "alpha nan is not between 0 and 1"),
        (["tiny-9"], "there is no run 'tiny-9'"),
    ],
)
def test_the_command_refuses_bad_input(kept_run: WholeRun, arguments: list[str], told: str) -> None:
    command = Command.start("interpolate", *arguments, workspace=kept_run.workspace.root)
    assert command.finish() == 2
    assert told in command.err
    assert "Traceback" not in command.err
