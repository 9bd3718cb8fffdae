"""What a plan says of memory, time and price, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_spec import write_tiny_spec

from cluster.cli import cli
from cluster.machines import GIB, Gpu, Node, describe, nodes_of
from cluster.pipeline import read_spec
from cluster.planning import advice, choices, nearest, room_on, short_of, step_seconds
from training.data.prepare import load_prepared, prepare
from training.errors import TenureError
from training.flops import flops_per_token, peak_flops
from training.memory import memory_parts
from training.models import ModelInfo
from training.plan import Plan, make_plan
from training.spec import RunSpec
from training.workspace import Workspace

# The shape of Llama-3.2-1B, in whole numbers.
BILLION = ModelInfo(Path("x"), "LlamaForCausalLM", 10**9, {}, 2048, 16, 128_000, 8192)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB)


@pytest.fixture(scope="module")
def planned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Plan]:
    """A run of full tuning in bf16 on GPUs, planned, and then said to be one of 10^9 parameters."""
    folder = tmp_path_factory.mktemp("planned")
    scaling = {"workers": 2, "gpus_per_worker": 1, "zero_stage": "auto"}
    training = {"precision": "bf16", "packing": False, "global_batch_size": 32}
    path = write_tiny_spec(folder, tiny_model, tuning={"type": "full"}, scaling=scaling, training=training)
    workspace = Workspace.at(folder / "workspace")
    spec = read_spec(path, workspace)
    counts = load_prepared(prepare(spec, workspace)).counts()
    plan = make_plan(spec, replace(BILLION, path=tiny_model), counts, None)
    changes: dict[str, Any] = {"trainable_parameters": 10**9, "num_tokens_per_epoch": 10**6, "steps_per_epoch": 100}
    return spec, replace(plan, steps=1000, **changes)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2e9, 2e9, 6e9), (2, 2e9, 1e9, 6e9), (3, 1e9, 1e9, 6e9)],
)
def test_states_are_sharded_as_the_stage_says(
    planned: tuple[RunSpec, Plan], stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """Two bytes a weight and gradient, twelve of optimizer; two workers (arXiv 1910.02054, figure 1)."""
    parts = memory_parts(planned[0], BILLION, 10**9, stage, 4, 1024)
    assert (parts.weights, parts.gradients, parts.optimizer) == (weights, gradients, optimizer)
    assert parts.activations == 4 * 1024 * 16 * (13 * 2048 + 6 * 8192), "with Liger's kernels"
    assert parts.logits == 2 * 2 * 4 * 1024 * 128_000 + 6 * 128_000 * 2048
    assert parts.total == sum(vars(parts).values())


def test_a_step_takes_its_operations_over_what_the_gpu_does(planned: tuple[RunSpec, Plan]) -> None:
    spec, plan = planned
    assert flops_per_token(spec, BILLION, 1024) == 6e9 + 6 * 16 * 2048 * 1024
    wanted = 10_000 * (6e9 + 6 * 16 * 2048 * 1024) / (2 * 989e12 * 0.44)
    assert step_seconds(spec, BILLION, plan, 1024, H100, 2, 2) == pytest.approx(wanted)
    assert step_seconds(spec, BILLION, plan, 1024, H100, 2, 3) == pytest.approx(wanted / 0.74)
    assert step_seconds(spec, BILLION, plan, 1024, Gpu("unheard of", GIB), 2, 2) is None


def test_the_longest_name_known_says_the_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("Radeon") is None


def test_the_least_sharding_that_fits_is_chosen(planned: tuple[RunSpec, Plan]) -> None:
    """16 bytes a parameter less what is sharded: 10 GB at ZeRO 1 for two workers, 9 at 2, 8 at 3, and the rest."""
    spec, plan = planned
    for memory_gib, stage in ((80, 1), (12.6, 2)):
        nodes = [Node("a", 16, 0, (Gpu("H100", int(memory_gib * GIB)),) * 2)]
        best = next(c for c in choices(spec, BILLION, plan, 64, nodes) if c.workers == 2)
        assert (best.fits, best.zero_stage) == (True, stage), memory_gib


def test_hours_and_price_follow_from_the_step(planned: tuple[RunSpec, Plan]) -> None:
    spec, plan = planned
    nodes = [Node("a", 32, 0, (H100,) * 4)]
    best = choices(spec, BILLION, plan, 1024, nodes, gpu_hour=3.0)[0]
    assert best.workers == 4, "more GPUs are faster"
    assert best.step_s is not None
    assert best.hours == pytest.approx(best.step_s * 1000 / 3600)
    assert best.price == pytest.approx(best.step_s * 1000 / 3600 * 4 * 3.0)
    assert f"workers: 4, zero_stage: {best.zero_stage}" in advice(spec, best)


def test_alternatives_differ_in_one_thing(planned: tuple[RunSpec, Plan]) -> None:
    spec, plan = planned
    made = choices(spec, BILLION, plan, 1024, [Node("a", 32, 0, (H100,) * 4)])
    told = nearest(made, made[0])
    assert sorted((c.zero_stage, c.recomputes) for c in told if c.workers == 4) == [(1, True), (2, False), (3, False)]
    assert sorted(c.workers for c in told if c.workers != 4) == [1, 2]


def test_layers_are_run_again_where_they_do_not_fit_otherwise(planned: tuple[RunSpec, Plan]) -> None:
    """Eight operations a parameter instead of six; one row of 4096 tokens keeps 0.5 GB instead of 5."""
    given, plan = planned
    spec = given.model_copy(update={"scaling": given.scaling.model_copy(update={"workers": 1})})
    best = choices(spec, BILLION, plan, 4096, [Node("a", 8, 0, (Gpu("H100", 26 * 10**9),))])[0]
    assert (best.fits, best.recomputes) == (True, True)
    assert "gradient_checkpointing: true" in advice(spec, best)
    again = spec.model_copy(update={"training": spec.training.model_copy(update={"gradient_checkpointing": True})})
    assert flops_per_token(again, BILLION, 0, made=True) == 8e9
    assert flops_per_token(again, BILLION, 0) == 6e9


def test_where_nothing_fits_it_is_said_what_would_help(planned: tuple[RunSpec, Plan]) -> None:
    spec, plan = planned
    best = choices(spec, BILLION, plan, 1024, [Node("a", 8, 0, (Gpu("L4", 2 * GIB),))])[0]
    assert not best.fits
    assert "nothing fits" in advice(spec, best)
    assert "tuning: {type: lora}" in advice(spec, best)


def test_no_more_workers_are_offered_than_there_is_room_for(planned: tuple[RunSpec, Plan]) -> None:
    given, plan = planned
    spec = given.model_copy(update={"scaling": given.scaling.model_copy(update={"workers": 16})})
    nodes = [Node("a", 2, 0, (H100,) * 4), Node("b", 8, 0, (H100,) * 2), Node("c", 64, 0, ())]
    assert room_on(spec, nodes) == 4, "two by the processors of a, two by the GPUs of b, none on c"
    assert {choice.workers for choice in choices(spec, BILLION, plan, 1024, nodes)} == {1, 2, 4}
    assert short_of(spec, nodes) == "the spec wants 16 workers; there is room for 4"
    assert short_of(given, nodes) == ""


def test_where_not_one_worker_has_room_it_is_said_what_there_is(planned: tuple[RunSpec, Plan]) -> None:
    spec, plan = planned
    with pytest.raises(TenureError, match="1 CPU and 1 GPU of one node; there are 24 CPU and 0 GPU on 2 nodes"):
        choices(spec, BILLION, plan, 1024, [Node("a", 8, 0, ()), Node("b", 16, 0, ())])


def test_a_dashboard_tells_of_nodes() -> None:
    gpu = {"name": "NVIDIA H100", "memoryTotal": 81_920}
    alive = {"raylet": {"state": "ALIVE", "resourcesTotal": {"CPU": 16.0, "GPU": 1.0}}, "mem": [100, 64 * GIB, 5, 1]}
    summary = [{**alive, "ip": "10.0.0.1", "gpus": [gpu]}, {"raylet": {"state": "DEAD"}, "ip": "10.0.0.2"}]
    nodes = nodes_of(summary)
    assert nodes == [Node("10.0.0.1", 16, 64 * GIB, (Gpu("NVIDIA H100", 80 * GIB),))]
    assert describe(nodes * 2) == ["2 x 16 processors, 64 GiB of memory free, 1 x NVIDIA H100 of 80 GiB"]


def test_the_command_plans_for_gpus_that_are_not_there(tiny_model: Path, tmp_path: Path) -> None:
    spec = write_tiny_spec(tmp_path, tiny_model, scaling={"gpus_per_worker": 1, "zero_stage": "auto"})
    root = ["--workspace", str(tmp_path / "workspace"), "plan", str(spec), "--gpus", "4", "--price", "2.5"]
    ended = CliRunner().invoke(cli, root, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
