"""How far a tuned model's next-token distributions are from its base's: KL(base || tuned) on given prompts and answers.

Exact over the whole vocabulary, in nats per target token. The base's log-probabilities are computed once, when it is
scored, and lie beside its scores; a tuned model is compared with them while it is scored itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training.data.encoding import Encoded
from training.data.items import SuiteItem, read_items
from training.evaluation.suites import encode_item
from training.spec import RunSpec
from training.suite_spec import FileSuite, Harness

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Role = Literal["target", "retention"]
# A token's log-probabilities take four bytes a word of the vocabulary: 200 MB for both roles at 49,152 words.
MAX_TOKENS = 512
MAX_TOKENS_PER_ITEM = 64


def kl_to_base(
    spec: RunSpec, model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, of_base: Path, *, is_base: bool
) -> dict[str, list[tuple[float, int]]]:
    """For every role (nats summed over an item's target tokens, their number) of each item that was looked at.

    Args:
        of_base: the file of the base's log-probabilities, written where the model is the base, otherwise read.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    rows = {role: list(_drawn(spec, role, tokenizer, max_length)) for role in ("target", "retention")}
    if is_base:
        tensors = {
            role: _stacked([log_probs(model, row).cpu() for row in found]) for role, found in rows.items() if found
        }
        of_base.parent.mkdir(parents=True, exist_ok=True)
        part = of_base.with_name(f".{of_base.name}.part")
        save_file(tensors, part)
        part.replace(of_base)
        return {role: [(0.0, row.num_targets) for row in found] for role, found in rows.items()}
    with safe_open(of_base, framework="pt") as file:
        read = {role: file.get_slice(role) for role, found in rows.items() if found}
        return {role: list(_compared(model, found, read[role])) if found else [] for role, found in rows.items()}


def _drawn(spec: RunSpec, role: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Encoded]:
    """Encoded items of the role's suites in turn, evenly spread over each suite, of MAX_TOKENS targets in all.

    Tasks of the harness have prompts of their own, and an item without a right answer has nothing to compare on.
    """
    suites = [suite for suite in getattr(spec.suites, role) if not isinstance(suite, Harness)]
    spread = [[(suite, item) for item in _spread(suite)] for suite in suites]
    room = MAX_TOKENS
    for suite, item in filter(None, chain.from_iterable(zip_longest(*spread))):
        row = _bounded(encode_item(suite, item, tokenizer, max_length), min(room, MAX_TOKENS_PER_ITEM))
        room -= row.num_targets
        yield row
        if not room:
            return


def _spread(suite: FileSuite) -> list[SuiteItem]:
    """Items with an answer in an order whose every beginning is spread over the whole suite."""
    items = [item for item in read_items(suite) if item.completion]
    order = sorted(range(len(items)), key=lambda index: (index * 0.6180339887498949) % 1)
    return [items[index] for index in order]


def _bounded(row: Encoded, most: int) -> Encoded:
    """The row up to its target number `most`."""
    targets = [place for place, is_target in enumerate(row.is_target) if is_target and place]
    end = (targets[most - 1] if len(targets) > most else len(row.ids) - 1) + 1
    return Encoded(row.ids[:end], row.is_target[:end])


def log_probs(model: Any, row: Encoded) -> torch.Tensor:
    """Log-probabilities (targets, vocabulary) in fp32, where the model is, of what stands at the target positions.

    One row at a time: rounding does not depend on what else is in a batch, so a model is at no distance from itself.
    """
    import torch

    from training.evaluation.likelihood import head_at

    places = torch.tensor([place - 1 for place, is_target in enumerate(row.is_target) if is_target and place])
    with torch.inference_mode(), head_at(model, len(row.ids), places.to(model.device)):
        logits = model(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False).logits
    found: torch.Tensor = logits.float().log_softmax(-1)
    return found


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(list(parts)).contiguous()


def _compared(model: Any, rows: Sequence[Encoded], of_base: Any) -> Iterator[tuple[float, int]]:
    from training.objective.divergence import forward_kl

    start = 0
    for row in rows:
        count = row.num_targets
        own = log_probs(model, row)
        given = of_base[start : start + count].to(own.device)
        # The terms are summed in double: a word of the vocabulary adds a rounding error of its own.
        yield float(forward_kl(given.double(), own.double()).sum()), count
        start += count
