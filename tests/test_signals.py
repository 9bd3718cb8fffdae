"""What a frozen model says of the rows: against the model itself, made once, whole or not at all."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from plain import target_logits
from safetensors.torch import load_file
from tiny_spec import write_rows, write_tiny_spec

from cluster.pipeline import read_spec
from training.aids import ready_signals
from training.data.encoding import Encoded
from training.data.prepare import Prepared, load_prepared, prepare
from training.errors import TenureError
from training.objective.objectives import TokenObjective, Totals
from training.objective.signals import Ask, SignalJob, Signals, compute_signals, signal_jobs
from training.objective.weighing import Weighed, describe, flow_weights, masked, stm_kept, weigh
from training.spec import RunSpec
from training.strategy import Flow, Stm
from training.tuning import load_base
from training.workspace import Workspace

ROWS = [{"question": "what is " + "1+" * n + "1", "answer": str(n + 1) * (1 + n % 3)} for n in range(14)]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


def spec_with(folder: Path, model: Path, workspace: Workspace, protections: list[dict[str, object]]) -> RunSpec:
    path = write_tiny_spec(folder, model, tuning={"type": "full"}, protections=protections)
    write_rows(folder / "train.jsonl", ROWS)
    return read_spec(path, workspace)


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path, workspace: Workspace) -> RunSpec:
    return spec_with(tmp_path / "spec", tiny_model, workspace, [{"type": "kl", "top_k": 7, "temperature": 2.0}])


def jobs_of(spec: RunSpec, workspace: Workspace, precision: str = "float32") -> dict[str, SignalJob]:
    return signal_jobs(spec, prepare(spec, workspace), workspace, precision, workspace.root)


def test_a_file_holds_what_the_model_says_of_every_target(spec: RunSpec, workspace: Workspace) -> None:
    (job,) = jobs_of(spec, workspace).values()
    compute_signals(job)
    signals, model = Signals(Path(job.target)), load_base(Path(spec.model), torch.float32)
    rows = load_prepared(Path(job.prepared)).train
    assert len({len(row.ids) for row in rows}) > 5
    for index, row in enumerate(rows):
        with torch.no_grad():
            logits, ids = target_logits(model, row)
        assert torch.allclose(
            signals.row_log_probs(index), logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], atol=1e-5
        )
        outcomes = signals.outcomes([index])
        assert outcomes.ids is not None
        warm = (logits / 2).softmax(-1)
        top = warm.topk(7)
        assert torch.equal(outcomes.ids, top.indices)
        assert torch.allclose(outcomes.log_probs[:, :7].exp(), top.values, atol=1e-6)
        assert torch.allclose(outcomes.log_probs[:, 7].exp(), 1 - top.values.sum(-1), atol=1e-6)


def test_rows_are_joined_in_the_order_asked_for_without_what_is_not_learned(
    spec: RunSpec, workspace: Workspace
) -> None:
    (job,) = jobs_of(spec, workspace).values()
    compute_signals(job)
    signals = Signals(Path(job.target))
    rows = load_prepared(Path(job.prepared)).train
    both = signals.outcomes([5, 2]).log_probs
    assert torch.equal(both, torch.cat([signals.outcomes([5]).log_probs, signals.outcomes([2]).log_probs]))
    kept = torch.rand(len(signals.log_probs), generator=torch.Generator().manual_seed(0)) > 0.5
    some = Signals(Path(job.target), kept).outcomes([5, 2]).log_probs
    wanted = torch.cat([kept[signals.span(5)], kept[signals.span(2)]])
    assert torch.equal(some, both[wanted])
    assert len(both) == rows[5].num_targets + rows[2].num_targets


def test_the_file_is_plain_safetensors_of_the_planned_size(spec: RunSpec, workspace: Workspace) -> None:
    (job,) = jobs_of(spec, workspace).values()
    compute_signals(job)
    targets = sum(row.num_targets for row in load_prepared(Path(job.prepared)).train)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(job.target).items()} == {
        "offsets": (len(ROWS) + 1,),
        "log_probs": (targets,),
        "top_ids": (targets, 7),
        "top_log_probs": (targets, 8),
    }


def test_what_decides_the_answers_decides_the_file(spec: RunSpec, tiny_model: Path, workspace: Workspace) -> None:
    def target(precision: str = "float32", rows: int = len(ROWS), **kl: object) -> str:
        write_rows(spec.data.train[0].path, ROWS[:rows])
        changed = spec.protections[0].model_copy(update=kl)
        (job,) = jobs_of(spec.model_copy(update={"protections": (changed,)}), workspace, precision).values()
        return job.target

    first = target()
    assert target() == first
    assert target(strength=9.0) == first, "the strength is not asked of the base"
    assert len({first, target(top_k=8), target(temperature=1.0), target("bfloat16"), target(rows=13)}) == 5


def test_more_than_the_vocabulary_is_the_vocabulary(tmp_path: Path, tiny_model: Path, workspace: Workspace) -> None:
    spec = spec_with(tmp_path / "spec", tiny_model, workspace, [{"type": "kl", "top_k": 5000}])
    (job,) = jobs_of(spec, workspace).values()
    assert job.ask == Ask(str(tiny_model), 259, 259, 1.0)


def test_nothing_is_asked_where_nothing_reads_it(tmp_path: Path, tiny_model: Path, workspace: Workspace) -> None:
    path = write_tiny_spec(tmp_path / "lora", tiny_model, protections=[{"type": "kl"}])
    assert jobs_of(read_spec(path, workspace), workspace) == {}, "an adapter is switched off instead"
    raw = yaml.safe_load(path.read_text())
    raw["data"]["train"] = [{"path": "train.jsonl", "prompt": "question", "chosen": "answer", "rejected": "question"}]
    path.write_text(yaml.safe_dump(raw | {"objective": {"type": "dpo"}, "protections": []}))
    assert jobs_of(read_spec(path, workspace), workspace) == {}


def test_a_pass_that_fails_leaves_no_file(spec: RunSpec, workspace: Workspace) -> None:
    (job,) = jobs_of(spec, workspace).values()
    broken = SignalJob(Ask(str(workspace.root / "nowhere"), 259), job.prepared, job.target, job.log)
    with pytest.raises(TenureError):
        compute_signals(broken)
    assert list(Path(job.target).parent.iterdir()) == []


def test_two_runs_at_once_make_the_same_file_and_a_third_makes_none(
    ray_cluster: None, spec: RunSpec, workspace: Workspace
) -> None:
    prepared = prepare(spec, workspace)

    def ready(number: int) -> str:
        return ready_signals(spec, prepared, workspace, workspace.root / f"logs-{number}")["signals"]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ready, range(2))
    assert first == second
    assert list(Path(first).parent.iterdir()) == [Path(first)]
    made = Path(first).stat().st_mtime_ns
    assert Signals(Path(first)).log_probs.isfinite().all()
    assert ready(3) == first
    assert Path(first).stat().st_mtime_ns == made
    assert not (workspace.root / "logs-3").exists()


# ---------------------------------------------------------------------------------------------- weights, masks


def prepared_of(*targets: int) -> Prepared:
    """Rows of one prompt token and so many targets."""
    rows = tuple(Encoded(tuple(range(count + 1)), (False,) + (True,) * count) for count in targets)
    return Prepared(rows, {}, 0)


class Said:
    """Signals of known log-probabilities, row by row."""

    def __init__(self, *rows: list[float]) -> None:
        self._rows = [torch.tensor(row) for row in rows]
        self.log_probs = torch.cat(self._rows)

    def row_log_probs(self, index: int) -> torch.Tensor:
        return self._rows[index]


def test_flow_weighs_rows_by_the_bases_mean_loss() -> None:
    said = Said([-1.0, -3.0], [-4.0], [-1.0, -1.0, -1.0])
    weights = flow_weights(prepared_of(2, 1, 3), said, Flow())  # type: ignore[arg-type]
    assert weights == pytest.approx([math.exp(-2 / 2), math.exp(-4 / 2), math.exp(-1 / 2)])
    weights = flow_weights(prepared_of(2, 1, 3), said, Flow(temperature=4.0))  # type: ignore[arg-type]
    assert weights == pytest.approx([math.exp(-2 / 4), math.exp(-4 / 4), math.exp(-1 / 4)])


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    weights = flow_weights(prepared_of(1, 1), Said([-1.0], [-3.0]), Flow())  # type: ignore[arg-type]
    assert weights == pytest.approx([math.exp(-1 / 2), math.exp(-3 / 2)])


def test_uniform_losses_give_uniform_weights() -> None:
    weights = flow_weights(prepared_of(2, 2, 1), Said([-2.0, -2.0], [-1.0, -3.0], [-2.0]), Flow())  # type: ignore[arg-type]
    assert weights == pytest.approx([math.exp(-1)] * 3)


def test_weights_without_a_scale_are_refused() -> None:
    with pytest.raises(TenureError, match="the base's median loss on the training rows is 0"):
        flow_weights(prepared_of(1, 1), Said([0.0], [0.0]), Flow())  # type: ignore[arg-type]
    with pytest.raises(TenureError, match=r"every row's weight exp\(-loss/0\.001\) is 0"):
        flow_weights(prepared_of(1, 1), Said([-3.0], [-2.0]), Flow(temperature=0.001))  # type: ignore[arg-type]


def test_stm_masks_what_the_base_finds_unlikely() -> None:
    data = prepared_of(3, 1)
    said = Said([math.log(0.5), math.log(0.3), math.log(0.9)], [math.log(0.1)])  # perplexities 2, 3.3, 1.1 and 10
    kept = stm_kept(data, said, Stm(threshold=2.5))  # type: ignore[arg-type]
    assert kept.tolist() == [True, False, True, False]
    left = masked(data, kept)
    assert [row.is_target for row in left.train] == [(False, True, False, True), (False, False)]
    assert [row.ids for row in left.train] == [row.ids for row in data.train]
    told = describe(data, Weighed(left, kept=kept))
    assert told == "stm masks 2 of 4 target tokens; 1 of 2 rows have none left"
    assert describe(data, Weighed(data)) == ""


def test_replayed_rows_count_in_full_and_are_not_masked() -> None:
    data = replace(prepared_of(2), replay=prepared_of(1, 2).train)
    said = Said([-1.0, -3.0], [-9.0], [-9.0, -0.1])
    assert flow_weights(data, said, Flow()) == pytest.approx([math.exp(-1), 1, 1])  # type: ignore[arg-type]
    kept = stm_kept(data, said, Stm(threshold=3.0))  # type: ignore[arg-type]
    assert kept.tolist() == [True, False, True, True, True]
    left = masked(data, kept)
    assert (left.train[0].num_targets, left.replay) == (1, data.replay)
    assert describe(data, Weighed(left, kept=kept)) == "stm masks 1 of 2 target tokens"
    with pytest.raises(TenureError, match="nothing is left to learn"):
        stm_kept(data, said, Stm(threshold=1.5))  # type: ignore[arg-type]
    weighed = Weighed(left, weights=(0.5, 1.0, 1.0), kept=kept)
    objective = TokenObjective(None, weighed, 0, 1.0, ())  # type: ignore[arg-type]
    assert objective.totals([0, 2]) == Totals(3, 2.5)


def test_stm_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(TenureError, match=r"every target token has a perplexity above 2\.5") as caught:
        stm_kept(prepared_of(1, 1), Said([math.log(0.2)], [math.log(0.1)]), Stm(threshold=2.5))  # type: ignore[arg-type]
    assert "well above 5, the lowest one" in str(caught.value)


def test_weighing_needs_no_signals_without_flow_and_stm(spec: RunSpec) -> None:
    data = prepared_of(1, 2)
    weighed = weigh(data, spec, {})
    assert (weighed.data, weighed.weights, weighed.kept) == (data, None, None)
