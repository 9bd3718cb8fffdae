"""Divergences against values worked out by hand, and over buckets against whole vocabularies."""

from __future__ import annotations

import math

import pytest
import torch

from training.objective.divergence import Outcomes, bucket_log_probs, divergence, forward_kl, jensen_shannon, reverse_kl

# Two distributions over three outcomes, and what the definitions give for them, by hand.
P = torch.tensor([[0.5, 0.25, 0.25]])
Q = torch.tensor([[0.25, 0.5, 0.25]])
KL_PQ = 0.25 * math.log(2)  # 1/2 log 2 - 1/4 log 2


def jsd_by_hand(beta: float) -> float:
    pairs = list(zip(P[0].tolist(), Q[0].tolist(), strict=True))
    mixed = [beta * p + (1 - beta) * q for p, q in pairs]
    to_p = sum(p * math.log(p / m) for (p, _), m in zip(pairs, mixed, strict=True))
    to_q = sum(q * math.log(q / m) for (_, q), m in zip(pairs, mixed, strict=True))
    return beta * to_p + (1 - beta) * to_q


def random_logits(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_forward_and_reverse_kl_of_known_distributions() -> None:
    skewed = torch.tensor([[0.8, 0.1, 0.1]])
    assert forward_kl(P.log(), Q.log()).item() == pytest.approx(KL_PQ)
    assert forward_kl(P.log(), skewed.log()).item() == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(2.5))
    assert reverse_kl(P.log(), skewed.log()).item() == pytest.approx(
        0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_its_definition(beta: float) -> None:
    assert jensen_shannon(P.log(), Q.log(), beta).item() == pytest.approx(jsd_by_hand(beta), rel=1e-5)


def test_jensen_shannon_with_one_half_is_symmetric_and_has_its_known_value() -> None:
    # m = (3/8, 3/8, 1/4): JSD = 1/2 (1/2 log 4/3 + 1/4 log 2/3) twice
    wanted = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert jensen_shannon(P.log(), Q.log(), 0.5).item() == pytest.approx(wanted)
    assert jensen_shannon(Q.log(), P.log(), 0.5).item() == pytest.approx(wanted)


def test_the_ends_of_beta_are_the_limits_of_the_scaled_divergence() -> None:
    p, q = ((random_logits(4, 7, seed).double() / 4).log_softmax(-1) for seed in (0, 1))
    small = 1e-7
    assert torch.allclose(jensen_shannon(p, q, 0.0), jensen_shannon(p, q, small) / small, atol=1e-4)
    assert torch.allclose(jensen_shannon(p, q, 1.0), jensen_shannon(p, q, 1 - small) / small, atol=1e-4)
    assert torch.equal(jensen_shannon(p, q, 0.0), forward_kl(p, q))
    assert torch.equal(jensen_shannon(p, q, 1.0), reverse_kl(p, q))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_buckets_of_the_whole_vocabulary_change_nothing(kind: str, temperature: float) -> None:
    given, tuned = random_logits(5, 11, 0), random_logits(5, 11, 1).requires_grad_()
    compare = divergence(kind, 0.3)
    whole = Outcomes((given / temperature).log_softmax(-1))
    ids = given.topk(11).indices
    cut = Outcomes(bucket_log_probs(given, ids, temperature), ids)
    values = [compare(outcomes.log_probs, outcomes.of(tuned, temperature)) for outcomes in (whole, cut)]
    assert torch.allclose(*values, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), tuned, retain_graph=True)[0] for value in values]
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_the_last_bucket_holds_the_rest_of_the_mass() -> None:
    logits = random_logits(3, 9, 0)
    ids = logits.topk(4).indices
    probabilities = logits.softmax(-1)
    buckets = bucket_log_probs(logits, ids, 1.0).exp()
    assert buckets.shape == (3, 5)
    assert torch.allclose(buckets[:, :4], probabilities.gather(1, ids))
    assert torch.allclose(buckets[:, 4], 1 - probabilities.gather(1, ids).sum(-1), atol=1e-6)


def test_a_rest_that_is_almost_nothing_keeps_its_logarithm() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]])
    assert bucket_log_probs(logits, torch.tensor([[0]]), 1.0)[0, 1].item() == pytest.approx(math.log(2) - 60, rel=1e-6)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        given = bucket_log_probs(logits, torch.tensor([[0]]), 1.0)
        tuned = torch.tensor([[0.0, 60.0, 0.0]], requires_grad=True)
        value = divergence(kind, 0.5)(given, bucket_log_probs(tuned, torch.tensor([[0]]), 1.0)).sum()
        (gradient,) = torch.autograd.grad(value, tuned)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_divergence_is_zero_of_itself_and_grows_with_fewer_buckets_less() -> None:
    p, q = random_logits(6, 20, 0), random_logits(6, 20, 1)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        compare = divergence(kind, 0.5)
        assert compare(p.log_softmax(-1), p.log_softmax(-1)).abs().max() < 1e-6
        values = []
        for k in (1, 5, 20):
            ids = p.topk(k).indices
            values.append(compare(bucket_log_probs(p, ids, 1.0), bucket_log_probs(q, ids, 1.0)).mean().item())
        assert 0 < values[0] < values[1] < values[2], "putting outcomes together can only hide differences"
