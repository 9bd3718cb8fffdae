"""Saves while training goes on: a rank's state is copied, written in a thread, and published once all have written.

Training waits for the copy alone. A save that is due before the one before is done waits for it, so there is never
more than one on its way, and what fails in the thread is raised at the next step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import checkpoint
from training.checkpoint import Snapshot, State
from training.storage import patiently


@dataclass(frozen=True)
class Keep:
    """How many checkpoints stay: the newest, and those with the lowest validation loss."""

    last: int = 1
    best: int = 0


@dataclass
class Saver:
    """Writes the checkpoints of one rank into a folder that all ranks share; every rank makes the same calls.

    `in_background` copies a rank's state into memory of the host, which is kept for the next time.
    """

    folder: Path
    spec_hash: str
    keep: Keep
    in_background: bool = False
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoints"))
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    _making: Future[None] | None = None
    _writing: Future[None] | None = None
    _publishing: Future[None] | None = None
    _about: dict[str, Any] = field(default_factory=dict)

    def prepare(self, state: State) -> None:
        """Begin to make the memory that copies go to, which takes seconds where it is large."""
        if self.in_background and self._making is None:
            self._making = self._thread.submit(self._make_buffers, state)

    def begin(self, step: int, state: State, validation_loss: float | None = None) -> None:
        """Save the state after `step` optimizer steps; in the background, only its copy is waited for."""
        self.finish()
        part = self._part(step)
        if dist.get_rank() == 0:
            patiently(lambda: checkpoint.make_part(self.folder, part), f"making {part}")
        dist.barrier()
        about = {"step": step, "spec_hash": self.spec_hash, "workers": dist.get_world_size()}
        self._about = {**about, "validation_loss": validation_loss, "scalars": checkpoint.scalars_of(state)}
        snapshot = self._copy(state)
        self._writing = self._thread.submit(checkpoint.write_rank, part, snapshot, dist.get_rank())
        if not self.in_background:
            self.finish()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a save that is on its way is on the disk.

        Raises:
            OSError: it could not be written, or the one before could not be published.
        """
        for done in (self._writing, self._publishing):
            if done is not None and done.done():
                done.result()
        return self._writing is not None and self._writing.done()

    def publish(self) -> None:
        """Make a save that every rank has written the newest checkpoint; old ones go only then."""
        self._writing = None
        if dist.get_rank() == 0:
            self._publishing = self._thread.submit(self._publish, self._about)

    def finish(self) -> None:
        """Wait until the save that is on its way stands."""
        if self._writing is not None:
            self._writing.result()
            dist.barrier()
            self.publish()
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None
        dist.barrier()

    def _part(self, step: int) -> Path:
        return self.folder / f".step-{step:07d}.part"

    def _publish(self, about: dict[str, Any]) -> None:
        step = about["step"]
        part, final = self._part(step), self.folder / f"step-{step:07d}"
        patiently(lambda: checkpoint.publish(part, final, about), f"publishing {final}")
        checkpoint.remove_old(self.folder, self.keep.last, self.keep.best)

    def _copy(self, state: State) -> Snapshot:
        """A rank's state as it is now: copied where training goes on meanwhile, else as it lies."""
        writes = state.layout.is_sharded or dist.get_rank() == 0
        tensors = checkpoint.flat_tensors(state) if writes else {}
        if self.in_background:
            if self._making is not None:
                self._making.result()
            self._make_buffers(state)
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            tensors = {name: self._buffers[name] for name in tensors}
        return Snapshot(tensors, state.layout.fragments if writes else None, checkpoint.random_state())

    def _make_buffers(self, state: State) -> None:
        """Memory of the host for every flat tensor; page-locked next to a GPU, which then copies at full speed."""
        for name, tensor in checkpoint.flat_tensors(state).items():
            known = self._buffers.get(name)
            if known is None or known.shape != tensor.shape:
                self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
