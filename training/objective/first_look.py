"""What a model can be trained with, tried out on the model itself before the first step."""

from __future__ import annotations

from typing import Any

import torch

from training.data.batches import collate, to_device
from training.data.encoding import Encoded
from training.errors import fail
from training.objective.targets import TargetLogits

# What is seen of another example is far more than kernels round otherwise from call to call, or at another size.
_ROUNDING, _KERNELS = 1e-3, 5e-2


@torch.no_grad()
def expect_apart(engine: Any, head: TargetLogits) -> None:
    """Compare what the model says of an example after two others and alone. All workers call it.

    Raises:
        TenureError: it differs, so examples see each other.
    """
    was_training = engine.module.training
    engine.eval()
    after, changed, alone = (_logits(engine, head, before) for before in ((_FIRST,), (_CHANGED,), ()))
    engine.train(was_training)
    scale = alone.abs().max()
    if (after - changed).abs().max() > _ROUNDING * scale or (after - alone).abs().max() > _KERNELS * scale:
        what = "this architecture lets packed examples see each other"
        raise fail(what, "training.packing", "set training.packing: false")


# Of two lengths, since those of one length have a kernel of their own.
_FIRST, _CHANGED, _SECOND = (1, 2, 3, 4, 5, 6), (6, 2, 4, 1, 3, 7), (9, 10, 11, 12, 13, 14, 15)


def _logits(engine: Any, head: TargetLogits, before: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Logits (targets of the second, vocabulary) where it stands packed after others."""
    rows = [Encoded(ids, (True,) * len(ids)) for ids in (*before, _SECOND)]
    targets = head.targets(engine, to_device(collate(rows, 0, end_to_end=True), engine.device))
    return targets.logits[targets.rows == len(before)].float()


def fuses_truly(engine: Any, head: TargetLogits, end_to_end: bool) -> bool:
    """Whether the model's loss may be computed without its logits. All workers call it."""
    was_training = engine.module.training
    engine.eval()
    rows = [Encoded(ids, (True,) * len(ids)) for ids in (_FIRST, _SECOND)]
    found = head.fuses_truly(engine, to_device(collate(rows, 0, end_to_end), engine.device))
    engine.train(was_training)
    return found
