"""Every way parameters can move: trained on two workers at ZeRO 0, 2 and 3, exported, reloaded and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import (
    JobValues,
    losses,
    plan_job,
    plan_of,
    rows_of,
    run_of,
    spec_of,
    start_job,
    train_here,
    train_in_group,
    weights,
    write_spec,
)
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter
from tiny_spec import write_tiny_spec
from transformers import AutoModelForCausalLM

from cluster.serving import served_form
from training.data.encoding import Encoded
from training.errors import TenureError
from training.evaluation.scoring import ScoreJob, read_scores, score_model
from training.job import Job, make_job
from training.peft_methods import REFUSED_METHODS, UNMERGEABLE, method_names
from training.spec import RunSpec
from training.specfile import load_spec
from training.stages import hash_spec
from training.strategy import (
    Lora,
    Tuning,
    is_served_as_adapter,
    missing_package,
    moves_base,
    tuning_refusal,
    unmergeable,
)
from training.tuning import apply_tuning, load_base, load_base_for
from training.worker import Trainer
from training.workspace import MERGED_FOLDER, RunFolder, Workspace, read_json

IDS = (5, 9, 17, 33, 65, 129, 3, 77, 101, 44, 8, 19)
STAGES = (0, 2, 3)
# Tokens of the sums. From its own first values most of DEFT's gradients are rounding noise around zero, which Adam
# makes whole steps of.
OPTIONS: dict[str, dict[str, Any]] = {
    "deft": {"init_weights": False},
    "trainable_tokens": {"token_indices": list(range(40, 60))},
}
# These move far less than others at the same rate; and those make whole steps of gradients that are rounding noise,
# which differs between processors: at 5e-3 up to 1.01e-4 (DeLoRA) and 2.1e-4 (WaveFT) between ZeRO 0 and 3.
RATES = {"pvera": 5e-2, "unilora": 5e-2, "vera": 5e-2} | {"delora": 1e-3, "waveft": 1e-3}
LORA: dict[str, dict[str, Any]] = {
    "rslora": {"options": {"use_rslora": True}},
    "dora": {"options": {"use_dora": True}},
    "pissa": {"options": {"init_lora_weights": "pissa"}},
    "fast-pissa-rslora": {"options": {"init_lora_weights": "pissa_niter_4", "use_rslora": True}},
    "olora": {"options": {"init_lora_weights": "olora"}},
    "orthogonal": {"options": {"init_lora_weights": "orthogonal"}},
    "lora-plus": {"learning_rate_ratio": 8.0},
    "one-layer": {"options": {"layers_to_transform": [1]}},
    "patterns": {"options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}},
    "saved-head": {"options": {"modules_to_save": ["lm_head"]}},
}
TUNINGS: dict[str, dict[str, Any]] = {
    **{name: {"type": name, "options": OPTIONS.get(name, {})} for name in method_names()},
    **{name: {"type": "lora", "rank": 4, "alpha": 8, **keys} for name, keys in LORA.items()},
    "partial": {"type": "partial", "parameters": ["model.layers.1.mlp.*", "*.input_layernorm.weight"]},
}
# Methods with buffers beside bf16 weights, or with transforms and decompositions.
IN_BF16 = (
    *("boft", "c3a", "delora", "dora", "fourierft", "hra", "oft", "osf", "prefix_tuning"),
    *("pvera", "randlora", "tinylora", "unilora", "vera", "waveft"),
)
# With the plain loss: the fused one rounds otherwise, and Adam makes whole steps of those gradients of FourierFT and
# WaveFT that are rounding noise (2e-4 between ZeRO 0 and 3). Its own parity is in tests/test_objectives.py.
TRAINING: dict[str, Any] = {
    "fused_loss": False,
    "max_steps": 2,
    "learning_rate": 5e-3,
    "micro_batch_size": 4,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "validation_items": 0,
    "validate_every_steps": 0,
    "checkpoint_every_steps": 0,
}


def keep_logits(trainer: Trainer, folder: RunFolder) -> None:
    """The live model's logits for all but the last of IDS, as what its output head gives out."""
    seen: list[torch.Tensor] = []
    head = trainer.engine.module.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().cpu().float()))
    trainer.engine.eval()
    with torch.no_grad():
        trainer._loss_sum([Encoded(IDS, (False,) + (True,) * (len(IDS) - 1))])
    hook.remove()
    if dist.get_rank() == 0:
        torch.save(torch.cat(seen), folder.path / "logits.pt")


def at_stage(job: JobValues, stage: int, workspace: Workspace) -> JobValues:
    """A planned job at another ZeRO stage."""
    spec = spec_of(job)
    spec = spec.model_copy(update={"scaling": spec.scaling.model_copy(update={"zero_stage": stage})})
    plan, run = replace(plan_of(job), zero_stage=stage), workspace.new_run(spec.name)
    return make_job(spec, plan, Path(job["prepared"]), run, hash_spec(spec), {})


@pytest.fixture(scope="module")
def jobs(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobValues]:
    """Jobs by "TUNING STAGE" in fp32, and "TUNING bf16" at ZeRO 2, each trained by two workers."""
    folder = tmp_path_factory.mktemp("tunings")
    workspace = Workspace.at(folder / "workspace")
    scaling = {"workers": 2, "zero_stage": 2}
    planned = {}
    for name, tuning in TUNINGS.items():
        for precision in ("fp32", "bf16") if name in IN_BF16 else ("fp32",):
            training = TRAINING | {"precision": precision, "learning_rate": RATES.get(name, 5e-3)}
            path = write_spec(
                folder / f"{name}-{precision}", tiny_model, tuning=tuning, training=training, scaling=scaling
            )
            planned[f"{name} {precision}"] = plan_job(path, workspace)
        whole = planned.pop(f"{name} fp32")
        planned |= {f"{name} {stage}": at_stage(whole, stage, workspace) for stage in STAGES}
    train_in_group(list(planned.values()), 2, folder / "ray", after=keep_logits)
    return planned


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def reloaded(artifact: Path, base: Path) -> Any:
    """The artifact as a user loads it: an adapter on its untouched base, or a whole model."""
    if (artifact / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(base_model(base), str(artifact))
    return base_model(artifact)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits (tokens less one, vocabulary) of IDS; those of a soft prompt before them are cut off."""
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits[0, -len(IDS) : -1]
    return found


def live_logits(job: JobValues) -> torch.Tensor:
    found: torch.Tensor = torch.load(run_of(job).path / "logits.pt")
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", TUNINGS)
def test_what_was_trained_is_what_the_artifact_reloads_as(
    jobs: dict[str, JobValues], tiny_model: Path, name: str, stage: int
) -> None:
    job = jobs[f"{name} {stage}"]
    live, artifact = live_logits(job), run_of(job).artifact
    torch.testing.assert_close(logits(reloaded(artifact, tiny_model)), live, atol=1e-4, rtol=0)
    assert (live - logits(base_model(tiny_model))).abs().max() > 1e-3
    torch.testing.assert_close(live, live_logits(jobs[f"{name} 0"]), atol=1e-4, rtol=0)
    assert losses(job) == pytest.approx(losses(jobs[f"{name} 0"]), abs=1e-4)
    assert "parameters move, but" not in (run_of(job).logs / "worker-0.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TUNINGS)
def test_what_vllm_does_not_take_as_an_adapter_is_merged_or_refused(
    jobs: dict[str, JobValues], tiny_model: Path, name: str
) -> None:
    job = jobs[f"{name} 3"]
    tuning, artifact = spec_of(job).tuning, run_of(job).artifact
    if unmergeable(tuning):
        assert not (artifact / MERGED_FOLDER).exists()
        with pytest.raises(TenureError, match=f"{tuning.type} cannot be served"):
            served_form(tuning, artifact)
        return
    folder, rank = served_form(tuning, artifact)
    if is_served_as_adapter(tuning):
        settings = read_json(folder / "adapter_config.json")
        shapes = {tensor.shape[0] for key, tensor in weights(job).items() if ".lora_A." in key}
        assert shapes == {rank} == {settings["r"]}
        assert (settings["peft_type"], settings["init_lora_weights"]) == ("LORA", settings["init_lora_weights"])
        return
    assert rank is None
    torch.testing.assert_close(logits(base_model(folder)), live_logits(job), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", IN_BF16)
def test_buffers_and_transforms_go_with_weights_in_bf16(
    jobs: dict[str, JobValues], tiny_model: Path, name: str
) -> None:
    job = jobs[f"{name} bf16"]
    live = live_logits(job)
    again = logits(reloaded(run_of(job).artifact, tiny_model))
    assert live.isfinite().all()
    # A logit of 8 has steps of 1/32 in bf16, and the reloaded model computes in fp32.
    assert (again - live).abs().mean() < 0.05 * again.abs().mean() + 0.02
    assert (again - logits(base_model(tiny_model))).abs().max() > 1e-3


def test_only_what_a_pattern_names_moves(jobs: dict[str, JobValues], tiny_model: Path) -> None:
    given, before = weights(jobs["partial 3"]), dict(base_model(tiny_model).named_parameters())
    assert given.keys() == before.keys()
    moved = {name for name, tensor in given.items() if not torch.equal(tensor, before[name])}
    projections = ("gate", "up", "down")
    wanted = {f"model.layers.1.mlp.{part}_proj.weight" for part in projections}
    assert moved == wanted | {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}


@pytest.mark.parametrize("name", ["pissa", "fast-pissa-rslora", "olora"])
def test_a_start_out_of_the_base_ends_as_plain_lora_of_twice_the_rank(jobs: dict[str, JobValues], name: str) -> None:
    settings = read_json(run_of(jobs[f"{name} 2"]).artifact / "adapter_config.json")
    assert (settings["r"], settings["init_lora_weights"]) == (8, True)
    assert settings["lora_alpha"] == pytest.approx(8 * 2**0.5 if settings["use_rslora"] else 16)


# ------------------------------------------------------------------------------------------- in this process


def test_lora_plus_moves_b_faster_by_its_ratio(
    one_process: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first step moves every element by its rate, whatever the gradient."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    tuning = {"type": "lora", "rank": 4, "learning_rate_ratio": 8.0, "options": {"init_lora_weights": False}}
    job = start_job(tmp_path, tiny_model, tuning=tuning, training=TRAINING | {"max_steps": 1})
    trainer = Trainer.start(Job(**job), run_of(job))
    named = {name: moving for name, moving in trainer.engine.module.named_parameters() if moving.requires_grad}
    before = {name: moving.detach().clone() for name, moving in named.items()}
    trainer.run()
    for name, moving in named.items():
        step = (moving.detach() - before[name]).abs().median().item()
        assert step == pytest.approx(5e-3 * (8 if ".lora_B." in name else 1), rel=1e-2)


@pytest.mark.parametrize("name", ["lora-plus", "pissa", "osf", "tinylora", "vblora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    one_process: None, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    training = TRAINING | {"max_steps": 4, "checkpoint_every_steps": 2}
    job = start_job(tmp_path, tiny_model, tuning=TUNINGS[name], training=training)
    train_here(job)
    whole = weights(job)
    run = run_of(job)
    run.artifact.rename(tmp_path / "whole")
    for file in (run.checkpoints / "step-0000004").iterdir():
        file.unlink()
    train_here(job)
    assert [row["step"] for row in rows_of(run) if row["kind"] == "resume"] == [2]
    resumed = weights(job)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", [*sorted(UNMERGEABLE), "vera"])
def test_the_reloaded_artifact_is_what_is_scored(
    one_process: None, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """Likelihoods, probes and greedy answers of the harness against the reloaded model's own, without any cache."""
    job = start_job(tmp_path / "job", tiny_model, tuning=TUNINGS[name], training=TRAINING)
    train_here(job)
    spec, artifact = spec_of(job), run_of(job).artifact
    target = tmp_path / "scores.json"
    score_model(ScoreJob(job["spec"], spec.model, str(artifact), True, str(target), str(tmp_path / "log")))
    answers, probes = read_scores(target)
    model = reloaded(artifact, tiny_model).eval()
    for probe in probes:
        ids = torch.tensor([probe.token_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, -ids.shape[1] : -1].log_softmax(-1)
        assert probe.log_probs == pytest.approx(log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4)
    said = probes[0].token_ids
    assert answers["sums"][0].answer.strip() == _greedy(model, spec, said).strip()


def _greedy(model: Any, spec: RunSpec, ids: tuple[int, ...]) -> str:
    """What the model says after the prompt of a probe, whose answer ("0") is its last token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    given = list(ids)[: ids.index(tokenizer.convert_tokens_to_ids("0"), len(ids) - 2)]
    start = len(given)
    while len(given) < start + 4:
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([given])).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        given.append(following)
    return str(tokenizer.decode(given[start:], skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------- refusals


def test_every_method_of_peft_is_offered_or_refused_with_a_reason() -> None:
    known = {method.value.lower() for method in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(method_names()) | set(REFUSED_METHODS) | {"lora"} == known
    assert not set(method_names()) & set(REFUSED_METHODS)
    assert set(UNMERGEABLE) < set(method_names())


def refused(folder: Path, tuning: dict[str, Any], **sections: Any) -> str:
    """What the spec with this tuning is refused with."""
    with pytest.raises(TenureError) as caught:
        load_spec(write_tiny_spec(folder, folder, tuning=tuning, **sections))
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize("method", sorted(REFUSED_METHODS))
def test_naming_a_refused_method_gives_its_reason(tmp_path: Path, method: str) -> None:
    told = refused(tmp_path, {"type": method})
    assert f"tuning.type: PEFT's {method} is not offered: {REFUSED_METHODS[method]}" in told


@pytest.mark.parametrize(
    ("tuning", "told"),
    [
        ({"type": "vera", "options": {"d_intial": 0.2}}, ["options.d_intial", "did you mean 'd_initial'?"]),
        ({"type": "vera", "options": {"r": "many"}}, ["options.r", "'many' is no value for r", "give int"]),
        ({"type": "vera", "options": {"task_type": "SEQ_CLS"}}, ["Tenure sets task_type itself", "CAUSAL_LM"]),
        ({"type": "oft", "options": {"r": 4, "oft_block_size": 4}}, ["PEFT refuses these options of oft", "both"]),
        ({"type": "trainable_tokens"}, ["needs the option token_indices"]),
        ({"type": "lora", "options": {"r": 4}}, ["options.r", "set tuning.rank"]),
        ({"type": "lora", "options": {"lora_alpha": 4}}, ["set tuning.alpha"]),
        ({"type": "lora", "options": {"use_dorra": True}}, ["did you mean 'use_dora'?"]),
        ({"type": "lora", "options": {"eva_config": {}}}, ["eva_config is not supported"]),
        ({"type": "lora", "options": {"init_lora_weights": "eva"}}, ["cannot start from 'eva'", "pissa_niter_N"]),
        (
            {"type": "lora", "options": {"init_lora_weights": "pissa", "use_dora": True}},
            ["pissa changes the base", "remove use_dora"],
        ),
        ({"type": "lora", "bits": 4}, ["scaling", "needs a GPU", "gpus_per_worker: 1"]),
        ({"type": "lora", "bits": 4, "options": {"init_lora_weights": "olora"}}, ["tuning.bits", "4 bits"]),
        ({"type": "lora", "bits": 8}, ["tuning.bits", "8"]),
        ({"type": "lora", "learning_rate_ratio": 0.0}, ["learning_rate_ratio"]),
        ({"type": "partial", "parameters": []}, ["parameters"]),
    ],
    ids=str,
)
def test_wrong_settings_are_told_with_what_to_set(tmp_path: Path, tuning: dict[str, Any], told: list[str]) -> None:
    message = refused(tmp_path, tuning)
    assert all(part in message for part in told), message


def test_a_base_of_4_bits_goes_with_a_gpu_bitsandbytes_and_zero_up_to_2(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = Lora(bits=4)
    monkeypatch.setattr("training.strategy.find_spec", lambda name: object())
    assert [tuning_refusal(tuning, stage, 1) is None for stage in range(4)] == [True, True, True, False]
    assert all(tuning_refusal(tuning, stage, 0) for stage in range(4))
    monkeypatch.setattr("training.strategy.find_spec", lambda name: None)
    missing = missing_package(tuning)
    assert missing is not None
    assert "tenure[qlora]" in missing[1]
    assert tuning_refusal(Lora(), 3, 0) is None
    assert missing_package(Lora()) is None


def test_bf16_at_zero_0_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, {"type": "full"}, training={"precision": "bf16"}, scaling={"zero_stage": 0, "workers": 2})
    assert "training.precision: DeepSpeed steps and accumulates in bf16 at ZeRO 0" in told
    assert "scaling.zero_stage: 1 or auto" in told


@pytest.mark.parametrize("method", sorted(UNMERGEABLE))
def test_what_cannot_be_merged_is_not_exported_merged(tiny_model: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(TenureError, match=f"{method} cannot be merged") as caught:
        load_spec(write_spec(tmp_path, tiny_model, tuning={"type": method}, amend={"export": {"merged": True}}))
    assert "export.merged" in str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "told"),
    [
        (
            {"type": "partial", "parameters": ["model.layers.7.mlp.*", "model.norm.weights"]},
            ["'model.layers.7.mlp.*' matches no parameter", "'model.norm.weights'", "model.norm.weight"],
        ),
        ({"type": "vera", "options": {"target_modules": ["nothing"]}}, ["PEFT cannot put vera on", "target_modules"]),
        ({"type": "c3a", "options": {"block_size": 7}}, ["PEFT cannot put c3a on"]),
        ({"type": "lora", "target_modules": ["qproj"], "options": {"use_dora": True}}, ["'qproj' names no linear"]),
    ],
    ids=["partial", "targets", "block", "lora"],
)
def test_what_does_not_fit_the_model_is_told_when_planning(
    tiny_model: Path, tmp_path: Path, tuning: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(TenureError) as caught:
        start_job(tmp_path, tiny_model, tuning=tuning, training=TRAINING)
    assert all(part in str(caught.value) for part in told), str(caught.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_base_of_4_bits_trains_an_adapter_for_that_base(
    one_process: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """On the CPU, which bitsandbytes knows too, though slowly: the refusal is put out of the way."""
    pytest.importorskip("bitsandbytes")
    for module in ("spec", "plan"):
        monkeypatch.setattr(f"training.{module}.tuning_refusal", lambda *given: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    job = start_job(tmp_path, tiny_model, zero=stage, tuning={"type": "lora", "bits": 4}, training=TRAINING)
    trainer = Trainer.start(Job(**job), run_of(job))
    assert {parameter.dtype for parameter in trainer.engine.module.parameters()} == {torch.uint8, torch.float32}
    trainer.run()
    keep_logits(trainer, run_of(job))
    base = load_base_for(spec_of(job).tuning, tiny_model, torch.float32)
    again = PeftModel.from_pretrained(base, str(run_of(job).artifact))
    torch.testing.assert_close(logits(again), live_logits(job), atol=1e-4, rtol=0)
    moving = sum(parameter.numel() for parameter in trainer.engine.module.parameters() if parameter.requires_grad)
    assert moving == plan_of(job).trainable_parameters


@pytest.mark.parametrize("name", [name for name, tuning in TUNINGS.items() if tuning["type"] != "partial"])
def test_a_switched_off_adapter_gives_the_base_back_unless_it_changes_it(tiny_model: Path, name: str) -> None:
    """What comparing with the base while training rests on."""
    tuning = TypeAdapter(Tuning).validate_python(TUNINGS[name])
    torch.manual_seed(0)
    model: Any = apply_tuning(load_base(tiny_model, torch.float32), tuning)
    before = logits(base_model(tiny_model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert (logits(model) - before).abs().max() > 1e-3
    with model.disable_adapter():
        given_back = (logits(model) - before).abs().max() < 1e-5
    assert given_back == (not moves_base(tuning))
