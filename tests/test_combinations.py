"""The table of what goes with what is the rules' own, and says what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from training.combinations import PROTECTIONS, TUNINGS, judge, table
from training.peft_methods import Method

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
