"""The arithmetic of a run, against what PEFT and torch count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_spec import write_tiny_spec

from training.errors import TenureError
from training.models import ModelInfo, read_model_info
from training.plan import GIB, DataCounts, Plan, count_trainable, make_plan
from training.spec import RunSpec
from training.specfile import load_spec
from training.strategy import Distill, Dpo, Full, Lora, Sft
from training.tuning import apply_tuning, load_base

COUNTS = DataCounts(num_examples=50, num_tokens=2000, num_target_tokens=300, longest=60, num_overlong=2)
# 1.1 billion parameters in 22 layers: Llama-shaped, with only what the estimate reads
LARGE = ModelInfo(Path("large"), "LlamaForCausalLM", 1_100_000_000, {}, 2048, 22, 32_000, 2048)


def spec_of(folder: Path, **sections: Any) -> RunSpec:
    padded = {"training": {"packing": False} | sections.pop("training", {})}
    return load_spec(write_tiny_spec(folder, folder, **sections, **padded))


def plan_of(
    folder: Path, info: ModelInfo = LARGE, limit: int | None = None, counts: DataCounts = COUNTS, **s: Any
) -> Plan:
    return make_plan(spec_of(folder, **s), info, counts, limit)


@pytest.mark.parametrize(
    "tuning",
    [
        Full(),
        Lora(rank=4),
        Lora(rank=1),
        Lora(rank=4, target_modules=("q_proj", "v_proj")),
        Lora(rank=3, target_modules=("mlp.down_proj",)),
    ],
    ids=str,
)
def test_the_planned_trainable_count_is_the_real_one(tiny_model: Path, tuning: Full | Lora) -> None:
    model = apply_tuning(load_base(tiny_model, torch.float32), tuning)
    real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_trainable(tuning, read_model_info(tiny_model)) == real


def test_targets_that_are_no_linear_modules_are_all_named(tiny_model: Path) -> None:
    with pytest.raises(TenureError) as caught:
        count_trainable(Lora(target_modules=("q_proj", "qproj", "embed_tokens")), read_model_info(tiny_model))
    assert [problem.what for problem in caught.value.problems] == [
        "'qproj' names no linear module",
        "'embed_tokens' names no linear module",
    ]
    known = "known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert {problem.instead for problem in caught.value.problems} == {known}


def test_steps_follow_from_examples_batch_and_epochs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, training={"epochs": 3, "warmup_ratio": 0.1})
    assert (plan.steps_per_epoch, plan.steps, plan.warmup_steps) == (7, 21, 2)
    assert (plan.validate_every_steps, plan.checkpoint_every_steps) == (6, 6)
    short = plan_of(tmp_path, training={"epochs": 3, "max_steps": 4, "warmup_ratio": 0.5, "checkpoint_every_steps": 0})
    assert (short.steps, short.warmup_steps, short.checkpoint_every_steps, short.validate_every_steps) == (4, 2, 0, 1)
    assert plan_of(tmp_path, training={"max_steps": 99}).steps == 7


@pytest.mark.parametrize(
    ("training", "workers", "micro", "accumulation"),
    [
        ({"global_batch_size": 8}, 1, 8, 1),
        ({"global_batch_size": 32}, 2, 8, 2),
        ({"global_batch_size": 12}, 2, 6, 1),
        ({"global_batch_size": 14}, 1, 7, 2),
        ({"global_batch_size": 13}, 1, 1, 13),
        ({"global_batch_size": 8, "micro_batch_size": 2}, 2, 2, 2),
    ],
)
def test_workers_accumulation_and_micro_batch_make_the_global_batch(
    tmp_path: Path, training: dict[str, Any], workers: int, micro: int, accumulation: int
) -> None:
    plan = plan_of(tmp_path, training=training, scaling={"workers": workers})
    assert (plan.micro_batch_size, plan.accumulation_steps) == (micro, accumulation)
    assert plan.workers * plan.accumulation_steps * plan.micro_batch_size == plan.global_batch_size


def test_a_plan_repeats_what_the_data_holds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert (plan.num_examples, plan.num_tokens_per_epoch, plan.num_target_tokens_per_epoch) == (50, 2000, 300)
    assert plan.num_overlong == 2


def test_full_tuning_needs_sixteen_bytes_a_parameter_and_a_bf16_adapter_about_two(tmp_path: Path) -> None:
    full = plan_of(tmp_path, tuning={"type": "full"}, training={"micro_batch_size": 1})
    assert full.memory_per_worker_bytes == pytest.approx(16 * LARGE.num_parameters, rel=0.15)
    lora = plan_of(tmp_path, training={"micro_batch_size": 1, "precision": "bf16"})
    assert lora.memory_per_worker_bytes == pytest.approx(2 * LARGE.num_parameters + 1.2 * GIB, rel=0.1)


def test_the_least_sharding_that_fits_is_chosen(tmp_path: Path) -> None:
    full = {"tuning": {"type": "full"}, "training": {"micro_batch_size": 1}, "scaling": {"workers": 4}}
    needs = [
        plan_of(tmp_path, **full | {"scaling": {"workers": 4, "zero_stage": stage}}).memory_per_worker_bytes
        for stage in range(4)
    ]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4
    for stage, memory in enumerate(needs):
        plan = plan_of(tmp_path, limit=memory, **full)
        assert (plan.zero_stage, plan.memory_per_worker_bytes) == (stage, memory)
    assert plan_of(tmp_path, **full).zero_stage == 0


def test_bf16_is_never_planned_without_fp32_accumulation(tmp_path: Path) -> None:
    assert plan_of(tmp_path, training={"precision": "bf16"}).zero_stage == 1
    assert plan_of(tmp_path, training={"precision": "fp32"}).zero_stage == 0


def test_a_run_that_does_not_fit_is_refused_with_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(TenureError) as caught:
        plan_of(tmp_path, limit=3 * GIB, tuning={"type": "full"}, scaling={"workers": 2})
    (problem,) = caught.value.problems
    assert "and may take 3.0 GiB" in problem.what
    assert problem.instead.startswith("try training.micro_batch_size below 4, tuning.type: lora, ")
    with pytest.raises(TenureError) as caught:
        plan_of(tmp_path, limit=3 * GIB, training={"micro_batch_size": 1}, scaling={"workers": 2, "zero_stage": 0})
    wanted = "try scaling.zero_stage above 0, training.gradient_checkpointing: true, a smaller training.max_length"
    assert caught.value.problems[0].instead.startswith(wanted)


def test_layers_that_are_run_again_keep_their_inputs_alone(tmp_path: Path) -> None:
    training = {"micro_batch_size": 8, "precision": "fp32"}
    kept = plan_of(tmp_path, training=training).memory_per_worker_bytes
    again = plan_of(tmp_path, training={**training, "gradient_checkpointing": True}).memory_per_worker_bytes
    hidden, layers = LARGE.hidden_size, LARGE.num_layers
    a_layer = 17 * hidden + 8 * 4 * hidden  # beside a frozen base, with the usual width of the MLP
    tokens = 2 * 8 * 60  # in 32 bits, which are twice the bytes
    assert kept - again == pytest.approx(tokens * ((layers - 1) * a_layer - 2 * layers * hidden), rel=1e-6)


def test_examples_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    info = replace(LARGE, max_positions=59)
    with pytest.raises(TenureError, match="up to 60 tokens, but the model has 59 positions"):
        plan_of(tmp_path, info=info)
    assert plan_of(tmp_path, info=replace(LARGE, max_positions=60)).steps == 7
    assert plan_of(tmp_path, info=replace(LARGE, max_positions=0)).steps == 7


def test_disk_holds_checkpoints_and_artifact(tmp_path: Path) -> None:
    count = LARGE.num_parameters
    full = plan_of(tmp_path, tuning={"type": "full"}, training={"keep_checkpoints": 1})
    assert full.disk_bytes == 2 * 16 * count + 4 * count


def test_a_teacher_beside_takes_its_weights_and_a_cached_one_disk(tmp_path: Path) -> None:
    counts = replace(COUNTS, num_target_tokens=10**6)
    teacher = replace(LARGE, num_parameters=3 * 10**9)

    def planned(**objective: Any) -> Plan:
        distill = Distill(teacher="teacher", **objective)
        spec = spec_of(tmp_path, training={"precision": "bf16", "micro_batch_size": 1})
        return make_plan(spec.model_copy(update={"objective": distill}), LARGE, counts, None, teacher)

    online, cached = planned(), planned(top_k=32)
    assert online.memory_per_worker_bytes - cached.memory_per_worker_bytes == pytest.approx(6 * 10**9, rel=0.01)
    assert cached.disk_bytes - online.disk_bytes == 10**6 * (8 + 8 * 32)
    need = online.memory_per_worker_bytes
    spec = spec_of(tmp_path, training={"precision": "bf16", "micro_batch_size": 1})
    spec = spec.model_copy(update={"objective": Distill(teacher="teacher")})
    with pytest.raises(TenureError) as caught:
        make_plan(spec, LARGE, counts, need - 1, teacher)
    assert "objective.top_k, which caches the teacher" in caught.value.problems[0].instead


def test_rows_longer_than_the_teachers_positions_are_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path).model_copy(update={"objective": Distill(teacher="teacher")})
    with pytest.raises(TenureError, match="up to 60 tokens, but the teacher has 59 positions"):
        make_plan(spec, LARGE, COUNTS, None, replace(LARGE, max_positions=59))


def test_a_pair_is_two_rows_of_memory(tmp_path: Path) -> None:
    def needs(micro: int, objective: Sft | Dpo) -> int:
        training = {"micro_batch_size": micro, "fused_loss": False}
        spec = spec_of(tmp_path, tuning={"type": "full"}, training=training)
        return make_plan(spec.model_copy(update={"objective": objective}), LARGE, COUNTS, None).memory_per_worker_bytes

    assert needs(2, Dpo()) == needs(4, Sft())
