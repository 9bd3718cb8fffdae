"""Which fused kernels a model gets, and that attention by rows is attention by examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import kernels
from training.attention import _by_example, _by_row
from training.errors import TenureError
from training.tuning import load_base


@pytest.mark.parametrize(
    ("asked", "known", "gpu", "chosen"),
    [
        ("auto", True, True, "liger"),
        ("auto", False, True, "none"),
        ("auto", True, False, "none"),
        ("liger", True, True, "liger"),
        ("compile", False, False, "compile"),
        ("none", True, True, "none"),
    ],
)
def test_what_is_chosen(asked: kernels.Kernels, known: bool, gpu: bool, chosen: str) -> None:
    assert kernels.choose(asked, known, gpu) == chosen


@pytest.mark.parametrize(("known", "gpu", "told"), [(True, False, "needs a GPU"), (False, True, "has no kernels for")])
def test_liger_where_it_cannot_be_is_refused(known: bool, gpu: bool, told: str) -> None:
    with pytest.raises(TenureError, match=told):
        kernels.choose("liger", known, gpu)


def test_layers_are_not_compiled_at_zero_3(tiny_model: Path) -> None:
    with pytest.raises(TenureError, match="cannot be compiled at ZeRO 3"):
        kernels.compile_layers(load_base(tiny_model, torch.float32), 3)


def test_compiled_layers_give_the_same_loss_and_gradients(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32; the compiler captures and differentiates, its code generator is left out."""
    compiled: list[torch.nn.Module] = []

    def compile_it(module: torch.nn.Module) -> None:
        compiled.append(module)
        vars(module)["_compiled_call_impl"] = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_it)
    plain, changed = (load_base(tiny_model, torch.float32) for _ in range(2))
    assert kernels.use_kernels(changed, "compile", 0) == "compile"
    assert len(compiled) == 2
    ids = torch.arange(3, 23).view(2, 10)
    found = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (plain, changed)]
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-4)
    for loss in found:
        loss.backward()
    for one, other in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [4, 2])
def test_examples_of_one_length_attend_as_rows(heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 15, 8)
    key, value = torch.randn(2, 1, heads, 15, 8)
    bounds = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    found = _by_row(query, key, value, None, 5)
    torch.testing.assert_close(found, _by_example(query, key, value, None, None, bounds))
