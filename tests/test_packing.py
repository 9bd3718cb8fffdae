"""Packed equals unpacked: the same losses, gradients and logged figures, whatever stands beside an example."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import losses, plan_of, rows_of, run_of, start_job, train_here, weights
from tiny import make_tiny_model
from tiny_spec import write_rows, write_tiny_spec
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from training.attention import attend_within, refusal
from training.data.batches import IGNORE, collate
from training.data.encoding import Encoded
from training.data.packing import efficiency, most_rows, pack, packed_batches
from training.data.prepare import Prepared
from training.errors import TenureError
from training.objective.first_look import expect_apart
from training.objective.objectives import Loss, Objective, TokenObjective
from training.objective.targets import TargetLogits, apart
from training.objective.weighing import Weighed
from training.plan import row_tokens
from training.specfile import load_spec
from training.tuning import load_base

CAPACITY = 32


def random_rows(count: int, longest: int = CAPACITY, seed: int = 0) -> tuple[Encoded, ...]:
    """Rows of 2 to `longest` tokens of the tiny vocabulary; the first token of some is marked as a target."""
    draw = random.Random(seed)
    lengths = [draw.randrange(2, longest + 1) for _ in range(count)]
    return tuple(
        Encoded(
            tuple(draw.randrange(256) for _ in range(length)),
            (*(draw.random() < 0.6 for _ in range(length - 1)), True),
        )
        for length in lengths
    )


# ------------------------------------------------------------------------------------------------------ bin packing


@pytest.mark.parametrize("seed", range(20))
def test_every_example_has_one_place_in_a_row_with_room_for_it(seed: int) -> None:
    lengths = [len(row.ids) for row in random_rows(200, seed=seed)]
    rows = pack(range(200), lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(sum(lengths[index] for index in row) <= CAPACITY for row in rows)
    assert -(-sum(lengths) // CAPACITY) <= len(rows) <= 1.23 * sum(lengths) / CAPACITY + 1


def test_packing_is_best_fit_decreasing() -> None:
    # 7 and 6 open rows; 4 leaves no room beside 6, 3 none beside 7; 2 opens the third.
    assert pack([0, 1, 2, 3, 4], [3, 6, 2, 7, 4], 10) == [[3, 0], [1, 4], [2]]


def test_an_example_longer_than_a_row_has_one_to_itself() -> None:
    assert pack([0, 1, 2], [5, 40, 6], 32) == [[1], [2, 0]]


def test_the_order_of_a_batch_does_not_decide_its_rows() -> None:
    lengths = [len(row.ids) for row in random_rows(60)]
    assert pack(range(60), lengths, CAPACITY) == pack(list(range(59, -1, -1)), lengths, CAPACITY)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_rows_are_dealt_out_in_turn(count: int) -> None:
    lengths = [len(row.ids) for row in random_rows(60)]
    rows = pack(range(60), lengths, CAPACITY)
    batches = packed_batches(range(60), lengths, CAPACITY, count)
    assert len(batches) == count
    assert sorted(index for batch in batches for index in batch) == list(range(60))
    for number, batch in enumerate(batches):
        assert batch == [index for row in rows[number::count] for index in row]


def test_full_rows_are_efficient() -> None:
    lengths = [len(row.ids) for row in random_rows(2000)]
    assert efficiency(pack(range(2000), lengths, 256), lengths, 256) > 0.99
    assert most_rows([range(10), range(100), range(50)], lengths, 64) == len(pack(range(100), lengths, 64))


# --------------------------------------------------------------------------------------------- what a model is fed


def test_tensors_end_to_end_tell_examples_apart() -> None:
    rows = [Encoded((5, 6, 7), (True, True, True)), Encoded((8, 9), (False, True)), Encoded((4, 3), (False, True))]
    batch = collate(rows, pad_id=0, end_to_end=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9, IGNORE, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["examples"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert batch["bounds"].tolist() == [0, 3, 5, 7]
    assert int(batch["longest"]) == 3


def test_a_batch_end_to_end_without_examples_is_padding_without_targets() -> None:
    batch = collate([], pad_id=3, end_to_end=True)
    assert (batch["input_ids"] == 3).all()
    assert (batch["labels"] == IGNORE).all()


SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "gpt2, learned positions": GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model as transformers has it, and the same one that keeps attention within examples."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param], attn_implementation="sdpa").eval()
    within = copy.deepcopy(plain)
    attend_within(within)
    return plain, within


def logits_end_to_end(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Logits (tokens, vocabulary)."""
    batch = collate(rows, 0, end_to_end=True)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=batch["input_ids"], **apart(batch), use_cache=False).logits
    return logits[0]


def test_no_example_sees_another(models: tuple[Any, Any]) -> None:
    """What stands before or behind an example changes nothing of it, bit for bit."""
    rows = list(random_rows(5, longest=12))
    before = logits_end_to_end(models[1], rows)
    bounds = collate(rows, 0, end_to_end=True)["bounds"].tolist()
    for number, row in enumerate(rows):
        other = replace(row, ids=tuple((token + 1) % 256 for token in row.ids))
        after = logits_end_to_end(models[1], [*rows[:number], other, *rows[number + 1 :]])
        own = torch.zeros(len(before), dtype=torch.bool)
        own[bounds[number] : bounds[number + 1]] = True
        assert torch.equal(after[~own], before[~own])
        assert not torch.equal(after[own], before[own])


def test_an_example_says_packed_what_it_says_alone_to_the_model_as_it_came(models: tuple[Any, Any]) -> None:
    plain, within = models
    rows = random_rows(12)
    packed = logits_end_to_end(within, rows)
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([row.ids])).logits[0] for row in rows]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_a_model_can_be_asked_for_itself_meanwhile(models: tuple[Any, Any]) -> None:
    """As scoring does, with padding on the left."""
    plain, within = models[0], copy.deepcopy(models[1])
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    with TargetLogits(within).whole(), torch.no_grad():
        found = within(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, plain(input_ids=ids, attention_mask=mask).logits)
    assert within.config._attn_implementation == models[1].config._attn_implementation


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SIZES, head_dim=8), "Gemma2Config caps its attention scores"),
        (MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1), None),
        (BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2), "BloomConfig has an attention of its own"),
        (LlamaConfig(**SIZES), None),
    ],
)
def test_a_config_tells_what_cannot_be_packed(config: PretrainedConfig, reason: str | None, tmp_path: Path) -> None:
    """Mamba's does not: the first look at the model itself does."""
    config.save_pretrained(tmp_path)
    assert refusal(tmp_path) == reason


def test_an_architecture_that_carries_a_state_along_the_row_is_refused(tiny_model: Path) -> None:
    attends = packing_model(tiny_model)
    expect_apart(Engine(attends), TargetLogits(attends))
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
    carries = MambaForCausalLM(config)
    with pytest.raises(TenureError, match="this architecture lets packed examples see each other"):
        expect_apart(Engine(carries), TargetLogits(carries))


# ----------------------------------------------------------------------------------------------------- objectives


def packing_model(folder: Path) -> Any:
    model = load_base(folder, torch.float32).eval()
    attend_within(model)
    return model


class Engine:
    """What an objective needs of an engine, around a bare model."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.module = model

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def eval(self) -> None:
        self.module.eval()

    def train(self, mode: bool) -> None:
        self.module.train(mode)


def of_batch(model: Any, objective: Objective, batches: list[list[int]], wanted: list[int]) -> tuple[Loss, Any]:
    """The loss of a global batch in micro-batches, and the gradients."""
    model.zero_grad()
    totals = objective.totals(wanted)
    shares = [objective.loss(Engine(model), batch, totals) for batch in batches]
    value = sum((share.value for share in shares), torch.zeros(()))
    value.backward()  # type: ignore[no-untyped-call]
    parts = {name: sum((share.parts[name] for share in shares), torch.zeros(())) for name in objective.names}
    return replace(shares[0], value=value.detach(), parts=parts), [p.grad.clone() for p in model.parameters()]


def test_loss_and_gradients_of_every_example_and_of_all_agree(tiny_model: Path) -> None:
    """With replayed rows and weights of rows; each example alone, beside others, and all as one global batch."""
    model, same_model = load_base(tiny_model, torch.float32).eval(), packing_model(tiny_model)
    data = Prepared(random_rows(14), {}, 0, replay=random_rows(6, seed=9))
    draw = random.Random(5)
    weighed = Weighed(data, tuple(draw.uniform(0.1, 2.0) for _ in range(20)))
    head = TargetLogits(model)
    plain = TokenObjective(head, weighed, 0, 1.0, ())
    packing = TokenObjective(TargetLogits(same_model), weighed, 0, 1.0, (), end_to_end=True)
    everything = list(range(20))
    for wanted in [*([index] for index in everything), everything]:
        # an example alone is a global batch whose other examples weigh nothing: they stand beside it all the same
        unpacked = of_batch(model, plain, [[index] for index in wanted], wanted)
        rows = packed_batches(wanted, data.lengths, CAPACITY, 3)
        same = of_batch(same_model, packing, rows, wanted)
        assert abs(float(same[0].value - unpacked[0].value)) < 1e-5
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(same[1], unpacked[1], strict=True))


def test_each_examples_gradient_in_a_full_row_is_its_own(tiny_model: Path) -> None:
    """All but one of a row's examples weigh nothing: what is left is the gradient of that one alone."""
    model, same_model = load_base(tiny_model, torch.float32).eval(), packing_model(tiny_model)
    data = Prepared(random_rows(6, longest=10, seed=2), {}, 0)
    head, same_head = TargetLogits(model), TargetLogits(same_model)
    for index in range(6):
        weights = tuple(float(other == index) for other in range(6))
        packing = TokenObjective(same_head, Weighed(data, weights), 0, 1.0, (), end_to_end=True)
        alone = TokenObjective(head, Weighed(data), 0, 1.0, ())
        whole = of_batch(same_model, packing, packed_batches(range(6), data.lengths, 64, 1), list(range(6)))
        single = of_batch(model, alone, [[index]], [index])
        assert abs(float(whole[0].value - single[0].value)) < 1e-5
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(whole[1], single[1], strict=True))


# ------------------------------------------------------------------------------------------------------- whole runs

RUNS: dict[str, dict[str, Any]] = {
    "sft": {},
    "lora kl": {"protections": [{"type": "kl", "strength": 0.5}]},
    "full kl flow": {
        "tuning": {"type": "full"},
        "protections": [{"type": "kl", "top_k": 7, "temperature": 2.0}, {"type": "flow"}],
    },
    "full stm": {"tuning": {"type": "full"}, "protections": [{"type": "stm", "threshold": 1000.0}]},
    "replay": {"protections": [{"type": "replay", "share": 0.25, "data": []}]},
    "lm": {"amend": {"objective": {"type": "lm"}, "data": {"train": [{"path": "train.jsonl", "text": "text"}]}}},
    "distill": {"amend": {"objective": {"type": "distill", "teacher": "", "weight": 0.6, "temperature": 2.0}}},
    "distill top k": {"amend": {"objective": {"type": "distill", "teacher": "", "top_k": 7}}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_packed_run_takes_the_same_steps(name: str, one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    keys = dict(RUNS[name])
    if name == "replay":
        facts = write_rows(tmp_path / "facts.jsonl", [{"q": f"recall {i}", "a": "x" * (1 + i % 9)} for i in range(11)])
        source = {"path": str(facts), "prompt": "q", "completion": "a"}
        keys["protections"] = [{"type": "replay", "share": 0.25, "data": [source]}]
    if name.startswith("distill"):
        teacher = make_tiny_model(tmp_path / "teacher", seed=3)
        keys = copy.deepcopy(keys)
        keys["amend"]["objective"]["teacher"] = str(teacher)
    most = 256 if name == "lm" else 96
    steps = {"max_steps": 4, "micro_batch_size": 2, "validate_every_steps": 0, "checkpoint_every_steps": 0}
    jobs = [
        start_job(
            tmp_path / str(packing), tiny_model, training=steps | {"max_length": most, "packing": packing}, **keys
        )
        for packing in (False, True)
    ]
    assert (plan_of(jobs[0]).row_tokens, plan_of(jobs[1]).row_tokens) == (0, most)
    assert plan_of(jobs[1]).accumulation_steps < plan_of(jobs[0]).accumulation_steps
    for job in jobs:
        train_here(job)
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), abs=1e-5)
    figures = [[row for row in rows_of(run_of(job)) if row["kind"] == "step"] for job in jobs]
    for one, two in zip(*figures, strict=True):
        assert one.keys() == two.keys()
        alike = one.keys() - {"seconds"}
        assert {key: two[key] for key in alike} == pytest.approx({key: one[key] for key in alike}, abs=1e-4)
    first, second = weights(jobs[0]), weights(jobs[1])
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


def test_a_packed_run_resumes_at_any_step(one_process: None, tiny_model: Path, tmp_path: Path) -> None:
    training = {"max_steps": 5, "packing": True, "max_length": 96, "schedule": "constant", "warmup_ratio": 0.0}
    whole, cut = (start_job(tmp_path / name, tiny_model, training=training) for name in ("whole", "cut"))
    train_here(whole)
    train_here(cut | {"plan": cut["plan"] | {"steps": 3, "checkpoint_every_steps": 3}})
    artifact = run_of(cut).artifact
    artifact.rename(artifact.with_name("early"))
    train_here(cut)
    assert losses(cut)[3:] == losses(whole)[3:]
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())


# ------------------------------------------------------------------------------------------------------- the spec


def spec_with(folder: Path, model: Path, packing: Any, **keys: Any) -> Any:
    training = {"packing": packing, "precision": "fp32"}
    return load_spec(write_tiny_spec(folder, model, training=training, **keys))


@pytest.mark.parametrize(
    ("packing", "gpus", "tokens"), [(False, 0, 0), (True, 0, 64), ("auto", 0, 0), ("auto", 1, 64), (False, 1, 0)]
)
def test_rows_are_packed_where_asked_for_and_on_gpus(
    packing: Any, gpus: int, tokens: int, tiny_model: Path, tmp_path: Path
) -> None:
    spec = spec_with(tmp_path, tiny_model, packing, scaling={"gpus_per_worker": gpus})
    assert row_tokens(spec) == tokens


def test_what_cannot_be_packed_is_not_unless_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    gpu = {"gpus_per_worker": 1}
    gemma = tmp_path / "gemma"
    shutil.copytree(tiny_model, gemma)
    Gemma2Config(**SIZES, head_dim=8).save_pretrained(gemma)
    assert row_tokens(spec_with(tmp_path, gemma, "auto", scaling=gpu)) == 0
    with pytest.raises(TenureError, match="Gemma2Config caps its attention scores, which cannot be packed"):
        row_tokens(spec_with(tmp_path, gemma, True, scaling=gpu))
    assert row_tokens(spec_with(tmp_path, tiny_model, "auto", tuning={"type": "prefix_tuning"}, scaling=gpu)) == 0


def test_what_cannot_be_packed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TenureError, match="prefix_tuning sets its prompt before every row"):
        spec_with(tmp_path, tiny_model, True, tuning={"type": "prefix_tuning"})
    path = write_tiny_spec(tmp_path, tiny_model, training={"packing": True})
    columns = "prompt: question\n    completion: answer\nsuites"
    text = path.read_text().replace(columns, "prompt: question\n    chosen: answer\n    rejected: question\nsuites")
    path.write_text(text + "objective: {type: dpo}\n")
    with pytest.raises(TenureError, match="the two answers of a pair are compared"):
        load_spec(path)
