"""Artifacts reload as what was trained, with all that a user of the base expects to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import STEPS, TUNINGS, JobValues, artifact_weights, run_of, start_job, train_here, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from training.export import export_artifact
from training.workspace import MERGED_FOLDER

IDS = torch.tensor([[5, 9, 17, 33, 65, 129, 3, 77]])


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_an_adapter_of_zero_3_reloads_and_equals_that_of_zero_0(
    two_workers: dict[str, JobValues], tiny_model: Path
) -> None:
    sharded, whole = (two_workers[f"lora fp32 {stage}"] for stage in (3, 0))
    given, wanted = weights(sharded), weights(whole)
    assert given.keys() == wanted.keys()
    assert all(given[name].numel() and given[name].shape == wanted[name].shape for name in wanted)
    assert all(tensor.abs().max() > 0 for tensor in given.values())
    tuned = PeftModel.from_pretrained(base_model(tiny_model), str(run_of(sharded).artifact))
    loaded = {name.replace(".default.", "."): tensor for name, tensor in tuned.state_dict().items() if ".lora_" in name}
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[name], given[name]) for name in given)
    same = PeftModel.from_pretrained(base_model(tiny_model), str(run_of(whole).artifact))
    torch.testing.assert_close(logits(tuned), logits(same), atol=1e-4, rtol=0)
    assert (logits(tuned) - logits(base_model(tiny_model))).abs().max() > 0.1


def test_merged_equals_unmerged(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    job = start_job(tmp_path, tiny_model, tuning=TUNINGS["lora"], training=STEPS, amend={"export": {"merged": True}})
    train_here(job)
    artifact = run_of(job).artifact
    unmerged = PeftModel.from_pretrained(base_model(tiny_model), str(artifact))
    merged = base_model(artifact / MERGED_FOLDER)
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(artifact / MERGED_FOLDER).chat_template


@pytest.mark.parametrize("stage", [0, 3])
def test_a_full_artifact_is_a_whole_model(two_workers: dict[str, JobValues], tiny_model: Path, stage: int) -> None:
    job = two_workers[f"full fp32 {stage}"]
    artifact, base = run_of(job).artifact, base_model(tiny_model)
    tuned = AutoModelForCausalLM.from_pretrained(artifact)
    assert tuned.dtype == torch.float32
    assert tuned.get_output_embeddings().weight is tuned.get_input_embeddings().weight
    assert "lm_head.weight" not in weights(job)
    given, before = dict(tuned.named_parameters()), dict(base.named_parameters())
    assert given.keys() == before.keys() == weights(job).keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in weights(job).items())
    assert (logits(tuned) - logits(base)).abs().max() > 0.1


def test_a_full_artifact_answers_like_its_base(two_workers: dict[str, JobValues], tiny_model: Path) -> None:
    """Tokenizer, chat template and generation config are the base's."""
    artifact = run_of(two_workers["full fp32 3"]).artifact
    given, wanted = AutoTokenizer.from_pretrained(artifact), AutoTokenizer.from_pretrained(tiny_model)
    assert given.chat_template == wanted.chat_template is not None
    assert given.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()
    assert given.special_tokens_map == wanted.special_tokens_map
    configs = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (artifact, tiny_model)]
    assert configs[0] == configs[1]
    assert configs[0]["eos_token_id"] == wanted.eos_token_id


def test_a_base_in_bf16_gives_an_artifact_in_bf16(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base_model(tiny_model).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    job = start_job(tmp_path / "job", base, tuning=TUNINGS["full"], training=STEPS | {"max_steps": 2})
    train_here(job)
    assert {tensor.dtype for tensor in weights(job).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(run_of(job).artifact, dtype="auto").dtype == torch.bfloat16


def test_persistent_buffers_are_part_of_a_full_artifact(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    job = start_job(tmp_path, tiny_model, tuning=TUNINGS["full"], training=STEPS | {"max_steps": 1})
    trainer = train_here(job)
    model = trainer.engine.module
    model.model.register_buffer("kept", torch.arange(3))
    model.model.register_buffer("passing", torch.arange(3), persistent=False)
    export_artifact(model, trainer.tokenizer, tiny_model, tmp_path / "again", trainer.spec, "again")
    found = artifact_weights(tmp_path / "again")
    assert found["model.kept"].tolist() == [0, 1, 2]
    assert "model.passing" not in found
