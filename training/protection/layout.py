"""Where the elements of every moving parameter lie in a rank's shards, at any ZeRO stage.

DeepSpeed keeps fp32 masters as flat shards: at stage 0 the parameters themselves, at stages 1 and 2 a stretch of all
parameters laid end to end, at stage 3 a stretch of each. A `Layout` is the map between the two views; a `Sheet` is a
set of tensors in the shape of the shards (importance, anchors, moments), filled from whole tensors by name and read
back into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from training.one_worker import OneWorker

Sheet = list[torch.Tensor]
# Elements [start, end) of a whole parameter, flattened: read(name, start, end).
Reader = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the parameter `name`, from its element `offset`, lie in shard `shard` from `start`."""

    name: str
    shard: int
    start: int
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The shards of this rank, the fragments in them, and the shapes of all moving parameters by name.

    `is_sharded` is False when every rank holds everything.
    """

    masters: tuple[torch.Tensor, ...]
    fragments: tuple[Fragment, ...]
    shapes: dict[str, tuple[int, ...]]
    is_sharded: bool

    @classmethod
    def of_engine(cls, engine: Any) -> Layout:
        """The layout of a DeepSpeed engine in fp32, or in bf16 from ZeRO 1 on."""
        named = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        if isinstance(engine, OneWorker):
            return cls._of_one_worker(engine, named)
        stage = engine.zero_optimization_stage()
        if stage == 0:
            return cls.of_parameters(named)
        masters, fragments = (_of_stage_3 if stage == 3 else _of_stages_1_and_2)(engine.optimizer, named)
        shapes = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in named.items()}
        return cls(masters, tuple(fragments), shapes, is_sharded=True)

    @classmethod
    def _of_one_worker(cls, engine: OneWorker, named: Mapping[str, torch.Tensor]) -> Layout:
        names = {id(value): name for name, value in named.items()}
        parts = [
            Fragment(names[id(value)], shard, start, 0, value.numel()) for value, shard, start in engine.stretches()
        ]
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        return cls(engine.masters, tuple(parts), shapes, is_sharded=False)

    @classmethod
    def of_parameters(cls, named: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of plain parameters: each its own shard."""
        fragments = tuple(Fragment(name, i, 0, 0, value.numel()) for i, (name, value) in enumerate(named.items()))
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        return cls(tuple(named.values()), fragments, shapes, is_sharded=False)

    def index(self, master: torch.Tensor) -> int:
        """Which shard a tensor in the optimizer's groups is."""
        return self._places[id(master)]

    @cached_property
    def _places(self) -> dict[int, int]:
        return {id(master): index for index, master in enumerate(self.masters)}

    def zeros(self, dtype: torch.dtype = torch.float32) -> Sheet:
        """A sheet of zeros."""
        return [torch.zeros_like(master, dtype=dtype, requires_grad=False) for master in self.masters]

    def copy(self, dtype: torch.dtype = torch.float32) -> Sheet:
        """A copy of the masters as they are now."""
        return [master.detach().to(dtype, copy=True) for master in self.masters]

    def spread(self, read: Reader, sheet: Sheet) -> None:
        """Fill a sheet from whole tensors; only this rank's stretches are read."""
        for part in self.fragments:
            whole = read(part.name, part.offset, part.offset + part.length)
            sheet[part.shard].detach().view(-1)[part.start : part.start + part.length] = whole.to(sheet[part.shard])

    def gather(self, sheet: Sheet, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole fp32 tensors of these parameters, on every rank; all ranks call it with the same names."""
        wanted = list(names)
        sizes = [torch.Size(self.shapes[name]).numel() for name in wanted]
        flat = torch.zeros(sum(sizes), device=self.device)
        pieces = dict(zip(wanted, torch.split(flat, sizes), strict=True))
        for part in self.fragments:
            if part.name in pieces:
                stretch = sheet[part.shard].detach().view(-1)[part.start : part.start + part.length]
                pieces[part.name][part.offset : part.offset + part.length] = stretch
        if self.is_sharded:
            dist.all_reduce(flat)
        return {name: piece.view(self.shapes[name]) for name, piece in pieces.items()}

    @property
    def device(self) -> torch.device:
        """Where the shards are."""
        return self.masters[0].device


def _of_stages_1_and_2(optimizer: Any, named: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], list[Fragment]]:
    # In bf16, stage 1 is a DeepSpeed optimizer of its own.
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    masters = tuple(optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups)
    fragments = []
    for name, parameter in named.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            fragments.append(Fragment(name, mapping.param_group_index, here.start, whole.start, here.numel))
    return masters, fragments


def _of_stage_3(optimizer: Any, named: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], list[Fragment]]:
    """Each rank holds an equal part of every parameter, the last one padded."""
    masters = tuple(optimizer.fp32_partitioned_groups_flat)
    fragments = []
    for name, parameter in named.items():
        shard, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = dist.get_rank() * size
        length = min(size, parameter.ds_numel - offset)
        if length > 0:
            fragments.append(Fragment(name, shard, start, offset, length))
    return masters, fragments


def gather_to_first(layout: Layout, sheet: Sheet) -> dict[str, torch.Tensor]:
    """Whole tensors of all moving parameters on the first worker's CPU, one at a time; elsewhere empty."""
    whole: dict[str, torch.Tensor] = {}
    for name in layout.shapes:
        tensor = layout.gather(sheet, [name])[name]
        if dist.get_rank() == 0:
            whole[name] = tensor.cpu()
    return whole


def refresh_weights(engine: Any) -> None:
    """Make the weights that the model computes with follow changed masters; every rank calls it."""
    if isinstance(engine, OneWorker):
        engine.update_weights()
        return
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
