"""Checks a teacher before anything starts: it must read and write the student's token ids."""

from __future__ import annotations

from pathlib import Path

from training.data.encoding import load_tokenizer
from training.errors import fail
from training.models import ModelInfo, read_model_info
from training.spec import RunSpec
from training.strategy import Distill


def check_teacher(spec: RunSpec) -> ModelInfo | None:
    """The size of the run's teacher; None when it has none.

    Raises:
        TenureError: the teacher's tokens are not the student's.
    """
    if not isinstance(spec.objective, Distill):
        return None
    teacher = Path(spec.objective.teacher)
    reason = tokens_differ(Path(spec.model), teacher)
    if reason:
        what = f"the teacher's tokens are not the model's: {reason}"
        instead = "take a teacher of the model's own family, or train on its answers with objective: {type: sft}"
        raise fail(what, "objective.teacher", instead)
    return read_model_info(teacher)


def tokens_differ(model: Path, teacher: Path) -> str:
    """How the tokens of two models differ, by their ids; empty when they do not."""
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (model, teacher))
    if ours == theirs:
        return ""
    ids = {token_id: token for token, token_id in theirs.items()}
    for token, token_id in sorted(ours.items(), key=lambda pair: pair[1]):
        if ids.get(token_id) != token:
            other = repr(ids[token_id]) if token_id in ids else "no token"
            return f"id {token_id} is {token!r} in the model and {other} in the teacher ({_sizes(ours, theirs)})"
    extra = min((token_id, token) for token, token_id in theirs.items() if token not in ours)
    return f"id {extra[0]} is {extra[1]!r} in the teacher and no token in the model ({_sizes(ours, theirs)})"


def _sizes(ours: dict[str, int], theirs: dict[str, int]) -> str:
    return f"{len(ours):,} and {len(theirs):,} tokens"
