"""The table of which tuning goes with which protection at which ZeRO stage, from the rules that refuse specs.

python -m training.combinations > docs/combinations.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from training.peft_methods import REFUSED_METHODS, Method
from training.section import Source
from training.spec import RunSpec
from training.strategy import Ewc, Flow, Generate, Kl, L2sp, Replay, Si, Stm, Wise

_SOURCE = Source.model_construct(path=Path("rows.jsonl"), prompt="p", completion="c")
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "partial": {"type": "partial", "parameters": ["*"]},
    "lora": {"type": "lora"},
    "lora, rsLoRA": {"type": "lora", "options": {"use_rslora": True}},
    "lora, LoRA+": {"type": "lora", "learning_rate_ratio": 16.0},
    "lora, PiSSA": {"type": "lora", "options": {"init_lora_weights": "pissa"}},
    "lora, DoRA": {"type": "lora", "options": {"use_dora": True}},
    "lora, 4 bits": {"type": "lora", "bits": 4},
    **{method: {"type": method} for method in get_args(Method)},
    "trainable_tokens": {"type": "trainable_tokens", "options": {"token_indices": [0]}},
}
PROTECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "l2sp": L2sp(strength=1.0).model_dump(),
    "ewc": Ewc(strength=1.0, data=(_SOURCE,)).model_dump(mode="json"),
    "si": Si(strength=1.0, data=(_SOURCE,)).model_dump(mode="json"),
    "replay": Replay(generate=Generate()).model_dump(mode="json"),
    "kl": Kl().model_dump(),
    "wise": Wise(alpha=0.5).model_dump(),
    "flow": Flow().model_dump(),
    "stm": Stm().model_dump(),
}


def judge(tuning: dict[str, Any], protection: dict[str, Any], stage: int) -> str | None:
    """Why a spec with this combination is refused; None when it is valid. A GPU is taken to be there.

    The names of the tuning and of the protection are left out, so that like reasons are one.
    """
    suite = {"name": "suite", "path": "suite.jsonl", "metric": "cross_entropy", "text": "text"}
    spec = {
        "name": "table",
        "model": "model",
        "tuning": tuning,
        "protections": [protection] if protection else [],
        "data": {"train": [{"path": "rows.jsonl", "prompt": "p", "completion": "c"}]},
        "suites": {"target": [suite]},
        "training": {"learning_rate": 1e-5, "precision": "fp32"},
        "scaling": {"zero_stage": stage, "gpus_per_worker": 1},
    }
    try:
        RunSpec.model_validate(spec)
    except ValidationError as error:
        told = "; ".join(str(fault.get("ctx", {}).get("what") or fault["msg"]) for fault in error.errors())
        told = told.replace(f"{tuning['type']} ", "the method ")
        return told.replace(f"{protection['type']} ", "it ", 1) if protection else told
    return None


def table() -> str:
    """The table in Markdown, with a numbered list of the reasons."""
    reasons: dict[str, int] = {}
    rows = [
        f"| {name} | " + " | ".join(_cell(tuning, protection, reasons) for protection in PROTECTIONS.values()) + " |"
        for name, tuning in TUNINGS.items()
    ]
    head = ["| tuning | " + " | ".join(PROTECTIONS) + " |", "| --- |" + " --- |" * len(PROTECTIONS)]
    told = [f"{number}. {reason}" for reason, number in reasons.items()]
    left_out = [f"| `{method}` | {reason} |" for method, reason in sorted(REFUSED_METHODS.items())]
    return "\n".join(
        [_HEAD, *head, *rows, "", "Refused, because:", "", *told, "", _LEFT_OUT, *left_out, ""],
    )


_HEAD = """# What goes with what

Which tuning goes with which protection, and at which ZeRO stages. This page is printed by the rules that refuse a spec:
`python -m training.combinations > docs/combinations.md`. Workers with GPUs are taken for granted, and bitsandbytes.
With bf16, ZeRO starts at 1. Any number of protections go together, each listed once.
"""
_LEFT_OUT = """Methods of PEFT that are not offered:

| method | because |
| --- | --- |"""


def _cell(tuning: dict[str, Any], protection: dict[str, Any], reasons: dict[str, int]) -> str:
    """The valid stages, as in `0-3`, and the numbers of the reasons for the others."""
    verdicts = [judge(tuning, protection, stage) for stage in range(4)]
    valid = [stage for stage, reason in enumerate(verdicts) if reason is None]
    numbers = {reasons.setdefault(reason, len(reasons) + 1) for reason in verdicts if reason is not None}
    return " ".join([*_ranges(valid), *(f"({number})" for number in sorted(numbers))])


def _ranges(stages: list[int]) -> Iterator[str]:
    if stages == list(range(stages[0], stages[-1] + 1)) if stages else False:
        yield str(stages[0]) if len(stages) == 1 else f"{stages[0]}-{stages[-1]}"
    else:
        yield from (str(stage) for stage in stages)


if __name__ == "__main__":
    print(table(), end="")
