"""What a frozen model says about the training rows: one pass, cached by content, read by workers from disk.

A file holds, for every target token in the order of the rows, its log-probability, and optionally the log-probabilities
of the k likeliest tokens and of the rest together. `offsets` tells where each row's targets start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from training.data.encoding import Encoded
from training.data.prepare import load_prepared
from training.data.store import lengths_of, targets_of
from training.models import hash_folder, read_model_info
from training.spec import RunSpec
from training.strategy import Distill, Dpo, Flow, Kl, Stm, moves_base
from training.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from training.objective.divergence import Outcomes

_SIGNALS_VERSION = 1
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384
_TARGETS_AT_ONCE = 256
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class Ask:
    """What to ask of a frozen model: its k likeliest tokens (0: none) at a temperature, among `vocabulary` ids."""

    model: str
    vocabulary: int
    top_k: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class SignalJob:
    """What a process that asks a model is sent; `target` is the file that it leaves."""

    ask: Ask
    prepared: str
    target: str
    log: str


def asks(spec: RunSpec) -> dict[str, Ask]:
    """What a run needs to know of frozen models before it trains, by the name of the aid."""
    wanted: dict[str, Ask] = {}
    base_size = read_model_info(Path(spec.model)).vocab_size
    kl = spec.protection(Kl) if moves_base(spec.tuning) else None
    reads_losses = any(isinstance(protection, Flow | Stm) for protection in spec.protections)
    if kl:
        wanted["signals"] = Ask(spec.model, base_size, min(kl.top_k, base_size), kl.temperature)
    elif reads_losses or (isinstance(spec.objective, Dpo) and moves_base(spec.tuning)):
        wanted["signals"] = Ask(spec.model, base_size)
    if isinstance(spec.objective, Distill) and spec.objective.top_k:
        size = min(base_size, read_model_info(Path(spec.objective.teacher)).vocab_size)
        top_k = min(spec.objective.top_k, size)
        wanted["teacher"] = Ask(spec.objective.teacher, size, top_k, spec.objective.temperature)
    return wanted


def signal_jobs(
    spec: RunSpec, prepared: Path, workspace: Workspace, precision: str, logs: Path
) -> dict[str, SignalJob]:
    """The job of every signal that a run needs, by the name of the aid; its target may stand already.

    Args:
        precision: of the frozen model, which decides its answers as the data do.
        logs: where the processes write.
    """
    wanted = asks(spec)
    if not wanted:
        return {}
    data = hash_rows(load_prepared(prepared).sequences)
    jobs = {}
    for name, ask in wanted.items():
        deciding = asdict(ask) | {"model": hash_folder(Path(ask.model))}
        parts = {"signals": _SIGNALS_VERSION, "data": data, "precision": precision, **deciding}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        target = workspace.cache / "signals" / f"{key}.safetensors"
        jobs[name] = SignalJob(ask, str(prepared), str(target), str(logs / f"ask-{name}.log"))
    return jobs


def hash_rows(rows: Iterable[Encoded]) -> str:
    """SHA-256 over the token ids and targets of encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(np.asarray(row.ids, "<i8").tobytes() + np.asarray(row.is_target, "?").tobytes())
    return digest.hexdigest()


def compute_signals(job: SignalJob) -> float:
    """Ask the model about every row and leave the file whole or not at all; the seconds it took."""
    from training.faults import explained_at, output_to

    with output_to(Path(job.log)), explained_at(Path(job.log)):
        started = time.monotonic()
        rows = load_prepared(Path(job.prepared)).sequences
        target = Path(job.target)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(part, job.ask, rows)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return time.monotonic() - started


def _write(part: Path, ask: Ask, rows: Sequence[Encoded]) -> None:
    offsets = np.concatenate([[0], np.cumsum(targets_of(rows), dtype=np.int64)]).astype("<i8")
    total = int(offsets[-1])
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"offsets": ("I64", offsets.shape), "log_probs": ("F32", (total,))}
    if ask.top_k:
        buckets = ask.top_k + (ask.top_k < ask.vocabulary)
        shapes |= {"top_ids": ("I32", (total, ask.top_k)), "top_log_probs": ("F32", (total, buckets))}
    with _TensorFile(part, shapes) as file:
        file.write("offsets", 0, offsets)
        for index, answers in _answers(ask, rows):
            for name, values in answers.items():
                file.write(name, int(offsets[index]), values)


class _TensorFile:
    """A safetensors file of known shapes, written piece by piece, so that it need not fit into memory."""

    def __init__(self, path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self._shapes = shapes
        self._starts: dict[str, int] = {}
        header, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + int(np.prod(shape)) * _DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._first = 8 + len(text)
        self._stream.truncate(self._first + end)

    def __enter__(self) -> _TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def write(self, name: str, row: int, values: np.ndarray[Any, Any]) -> None:
        """Put `values` at row `row` of a tensor."""
        dtype, shape = self._shapes[name]
        width = int(np.prod(shape[1:])) * _DTYPES[dtype].itemsize
        self._stream.seek(self._first + self._starts[name] + row * width)
        self._stream.write(np.ascontiguousarray(values, _DTYPES[dtype]).tobytes())


def _answers(ask: Ask, rows: Sequence[Encoded]) -> Iterator[tuple[int, dict[str, np.ndarray[Any, Any]]]]:
    """Each row's index with the tensors of its targets; rows of like length are asked together."""
    import torch

    from training.data.batches import collate
    from training.objective.targets import TargetLogits
    from training.tuning import load_base

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = load_base(Path(ask.model), torch.bfloat16 if gpu else torch.float32).to(device).eval()
    head = TargetLogits(model)
    with torch.inference_mode():
        for indices in _groups(rows, _GPU_TOKENS if gpu else _CPU_TOKENS):
            batch = collate([rows[index] for index in indices], 0)
            targets = head.targets(model, {key: value.to(device) for key, value in batch.items()})
            if targets.is_empty:
                continue
            pieces = [slice(start, start + _TARGETS_AT_ONCE) for start in range(0, len(targets.ids), _TARGETS_AT_ONCE)]
            parts = [_answer(ask, targets.logits[piece, : ask.vocabulary], targets.ids[piece]) for piece in pieces]
            answers = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
            start = 0
            for index in indices:
                end = start + rows[index].num_targets
                yield index, {name: values[start:end] for name, values in answers.items()}
                start = end


def _answer(ask: Ask, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the file keeps of logits (targets, vocabulary) and the ids (targets,) that follow."""
    from torch.nn import functional

    from training.objective.divergence import bucket_log_probs

    answer = {"log_probs": -functional.cross_entropy(logits.float(), ids, reduction="none")}
    if ask.top_k:
        top = logits.float().topk(ask.top_k, dim=-1).indices
        answer |= {"top_ids": top, "top_log_probs": bucket_log_probs(logits, top, ask.temperature)}
    return answer


def _groups(rows: Sequence[Encoded], num_tokens: int) -> Iterator[list[int]]:
    """Indices by length, in groups whose padded size stays below num_tokens (or of one row)."""
    group: list[int] = []
    lengths = lengths_of(rows)
    for index in np.argsort(lengths, kind="stable").tolist():
        if group and (len(group) + 1) * int(lengths[index]) > num_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class Signals:
    """A file of signals; the large tensors stay on disk and are read row by row.

    Args:
        kept: (targets,) which target tokens are learned, where some of them are not; the others are passed over.
    """

    def __init__(self, path: Path, kept: torch.Tensor | None = None) -> None:
        from safetensors import safe_open

        self._file = cast(Any, safe_open(path, framework="pt"))
        self._offsets: list[int] = self._file.get_tensor("offsets").tolist()
        self.log_probs: torch.Tensor = self._file.get_tensor("log_probs")
        self._kept = kept

    def span(self, index: int) -> slice:
        """Where the targets of a row stand."""
        return slice(self._offsets[index], self._offsets[index + 1])

    def row_log_probs(self, index: int) -> torch.Tensor:
        """Log-probabilities (targets of the row,) of the tokens themselves, at temperature 1."""
        return self.log_probs[self.span(index)]

    def outcomes(self, indices: Sequence[int]) -> Outcomes:
        """The likeliest tokens at the learned targets of some rows, one row after another."""
        import torch

        from training.objective.divergence import Outcomes

        tensors = []
        for name in ("top_log_probs", "top_ids"):
            whole = self._file.get_slice(name)
            tensors.append(torch.cat([self._learned(whole[self.span(index)], index) for index in indices]))
        return Outcomes(tensors[0], tensors[1].long())

    def _learned(self, values: torch.Tensor, index: int) -> torch.Tensor:
        return values if self._kept is None else values[self._kept[self.span(index)]]
