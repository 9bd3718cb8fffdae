"""The table of what goes with what is the rules' own, and says what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from training.combinations import PROTECTIONS, TUNINGS, judge, table
from training.peft_methods import Method
from training.strategy import Peft
from training.tuning import apply_tuning, load_base

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_rules_print() -> None:
    page = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert page == table(), "run: python -m training.combinations > docs/combinations.md"


def test_every_tuning_and_protection_of_the_spec_is_in_the_table() -> None:
    assert {tuning["type"] for tuning in TUNINGS.values()} == {"full", "partial", "lora", *get_args(Method)}
    assert set(PROTECTIONS) == {"none", "l2sp", "ewc", "si", "replay", "kl", "wise", "flow", "stm"}


def test_whole_weights_and_plain_lora_go_with_everything_at_every_stage() -> None:
    for name in ("full", "partial", "lora"):
        for protection in PROTECTIONS.values():
            assert [judge(TUNINGS[name], protection, stage) for stage in range(4)] == [None] * 4


@pytest.mark.parametrize("method", get_args(Method))
def test_switching_off_any_method_gives_the_base_back(tiny_model: Path, method: str) -> None:
    """What kl and dpo compare with, for adapters, is the base itself and not a base that the method has changed."""
    tuning = Peft.model_validate({**TUNINGS[method]})
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        wanted = load_base(tiny_model, torch.float32).eval()(input_ids=ids, use_cache=False).logits
        torch.manual_seed(0)
        model = apply_tuning(load_base(tiny_model, torch.float32), tuning).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        tuned = model(input_ids=ids, use_cache=False).logits[:, -9:]
        with model.disable_adapter():  # type: ignore[operator]
            off = model(input_ids=ids, use_cache=False).logits
    assert (tuned - wanted).abs().max() > 1e-3
    assert torch.equal(off, wanted)
