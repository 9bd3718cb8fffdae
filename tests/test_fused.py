"""The loss that is computed with its gradients equals plain cross-entropy and autograd's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig

from training.data.encoding import Encoded
from training.data.prepare import Prepared
from training.objective import fused
from training.objective.first_look import fuses_truly
from training.objective.objectives import TokenObjective
from training.objective.targets import TargetLogits
from training.objective.weighing import Weighed


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_losses_and_gradients_are_those_of_plain_cross_entropy(
    chunk_rows: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    ids, shares = torch.randint(11, (7,)), torch.rand(7)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", chunk_rows * 11 * 4)
    value, losses = fused.weighted_cross_entropy(hidden, weight, ids, shares)
    (factor * value).backward()
    found = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    plain = functional.cross_entropy(hidden @ weight.T, ids, reduction="none")
    (factor * (plain * shares).sum()).backward()
    assert torch.allclose(losses, plain, atol=1e-6)
    assert torch.allclose(value, (plain * shares).sum(), atol=1e-6)
    for one, two in zip(found, (hidden.grad, weight.grad), strict=True):
        assert one is not None
        assert two is not None
        assert torch.allclose(one, two, atol=1e-5)


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    value, _ = fused.weighted_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]), torch.ones(4))
    value.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


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


@pytest.mark.parametrize(
    ("config", "fuses"),
    [
        (LlamaConfig(**SIZES), True),
        (LlamaConfig(**SIZES, tie_word_embeddings=True), True),
        (GraniteConfig(**SIZES, logits_scaling=4.0), False),
        (CohereConfig(**SIZES, logit_scale=0.5), False),
        (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.01), False),
    ],
)
def test_it_is_used_where_the_model_leaves_its_logits_as_they_are(config: PretrainedConfig, fuses: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert fuses_truly(Engine(model), TargetLogits(model), end_to_end=False) == fuses


def test_a_model_learns_the_same_with_it() -> None:
    """Weights of rows, a micro-batch without examples, and the losses that are logged."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True))
    rows = tuple(Encoded(tuple(range(1, 4 + n)), (False, *[True] * (2 + n))) for n in range(5))
    objective = TokenObjective(
        TargetLogits(model), Weighed(Prepared(rows, {}, 0), (0.5, 1.0, 2.0, 0.0, 1.5)), 0, 1.0, ()
    )
    found = []
    for objective.head.fuses in (False, True):
        model.zero_grad()
        losses = [objective.loss(Engine(model), part, objective.totals(range(5))) for part in ([0, 1, 2], [3, 4], [])]
        sum(loss.value for loss in losses).backward()  # type: ignore[union-attr]
        found.append((torch.cat([loss.losses for loss in losses]), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found[0][1], found[1][1], strict=True))
