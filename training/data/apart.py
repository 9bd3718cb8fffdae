"""Whether a model keeps packed examples apart: tried out on the model itself, before the first step."""

from __future__ import annotations

from typing import Any

import torch

from training.data.batches import collate
from training.data.encoding import Encoded
from training.errors import fail
from training.objective.targets import TargetLogits

# Kernels may round otherwise from call to call; what is seen of another example is far more.
_ROUNDING = 1e-3


@torch.no_grad()
def expect_apart(engine: Any, head: TargetLogits) -> None:
    """Change the first of two packed examples and compare what the model says of the second. All workers call it.

    Raises:
        TenureError: it changed, so examples see each other.
    """
    was_training = engine.module.training
    engine.eval()
    before, after = (_logits(engine, head, first) for first in (_FIRST, _CHANGED))
    engine.train(was_training)
    if (after - before).abs().max() > _ROUNDING * before.abs().max():
        what = "this architecture lets packed examples see each other"
        raise fail(what, "training.packing", "set training.packing: false")


_FIRST, _CHANGED, _SECOND = (1, 2, 3, 4, 5, 6), (6, 2, 4, 1, 3, 7), (9, 10, 11, 12, 13, 14)


def _logits(engine: Any, head: TargetLogits, first: tuple[int, ...]) -> torch.Tensor:
    """Logits (targets of the second, vocabulary) where it stands packed after the first."""
    rows = [Encoded(ids, (True,) * len(ids)) for ids in (first, _SECOND)]
    batch = collate(rows, 0, row_tokens=len(first) + len(_SECOND))
    targets = head.targets(engine, {name: tensor.to(engine.device) for name, tensor in batch.items()})
    return targets.logits[targets.rows == 1].float()
