"""Which examples every step sees, by seed and step alone, whatever the number of workers. Free of torch."""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from training.data.mixture import Task, spread, tasks_of
from training.spec import RunSpec

Places = npt.NDArray[np.int64]
_ROUNDS = 4


@dataclass(frozen=True)
class Schedule:
    """The order of examples over a run: `epochs` permutations cut into global batches, the last one short.

    With tasks, an epoch holds of every task the rows that it says, in a new order each epoch: batch by batch its share,
    and never less than `minimum`. Where an epoch takes fewer than there are, the next one goes on with the others.

    With replay, every global batch holds `replay_per_batch` replay rows beside its training rows. Those rows come
    from passes over all `num_replay` of them, each pass a permutation by its own number, whatever the epoch.
    """

    num_examples: int
    global_batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None
    num_replay: int = 0
    replay_per_batch: int = 0
    tasks: tuple[Task, ...] = ()
    minimum: int = 0

    @property
    def rows_per_epoch(self) -> int:
        """Training rows of an epoch: all examples, or what the tasks give."""
        return sum(task.rows for task in self.tasks) if self.tasks else self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Steps that an epoch takes."""
        return math.ceil(self.rows_per_epoch / self._train_per_batch)

    @property
    def _train_per_batch(self) -> int:
        return self.global_batch_size - self.replay_per_batch

    @property
    def num_steps(self) -> int:
        steps = self.steps_per_epoch * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def batch(self, step: int) -> list[int]:
        """Indices of the examples in global batch `step` (from 0); replay row i is example num_examples + i."""
        epoch, position = divmod(step, self.steps_per_epoch)
        train = self._mixed(epoch, position) if self.tasks else self._plain(epoch, position)
        return [*train, *self._replayed(step)]

    def _plain(self, epoch: int, position: int) -> list[int]:
        start = position * self._train_per_batch
        return _order(self.num_examples, f"{self.seed}/{epoch}")[start : start + self._train_per_batch].tolist()

    def _mixed(self, epoch: int, position: int) -> list[int]:
        """Every task's rows between what earlier batches took and what this one leaves."""
        before, after = self._taken(position), self._taken(position + 1)
        parts = zip(self.tasks, before, after, strict=True)
        return [index for task, start, end in parts for index in _drawn(task, epoch, start, end, self.seed)]

    def _taken(self, batches: int) -> list[int]:
        """How many rows of every task the first `batches` of an epoch hold: the minimum, and of the rest its share."""
        free = [task.rows - self.steps_per_epoch * self.minimum for task in self.tasks]
        places = batches * (self._train_per_batch - self.minimum * len(self.tasks))
        return [batches * self.minimum + count for count in spread(free, min(places, sum(free)))]

    def _replayed(self, step: int) -> list[int]:
        """The batch's stretch of the endless row of passes over the replay rows."""
        start = step * self.replay_per_batch
        places = (divmod(place, self.num_replay) for place in range(start, start + self.replay_per_batch))
        return [self.num_examples + _order(self.num_replay, f"{self.seed}/replay/{n}")[at] for n, at in places]


def schedule_of(spec: RunSpec, sizes: Sequence[int], num_replay: int, replay_per_batch: int) -> Schedule:
    """Which examples every step of a run sees.

    Args:
        sizes: training examples of every source.

    Raises:
        TenureError: the tasks cannot be mixed as they should.
    """
    training, mixture = spec.training, spec.data.mixture
    tasks = tasks_of(spec.data, sizes, training.global_batch_size - replay_per_batch) if mixture else ()
    return Schedule(
        num_examples=sum(sizes),
        global_batch_size=training.global_batch_size,
        epochs=training.epochs,
        seed=training.seed,
        max_steps=training.max_steps,
        num_replay=num_replay,
        replay_per_batch=replay_per_batch,
        tasks=tasks,
        minimum=mixture.minimum if mixture else 0,
    )


@lru_cache(maxsize=3)
def _order(count: int, name: str) -> array[int]:
    """The permutation of that name, 4 bytes a row; kept, since every step of an epoch or pass asks for it."""
    order = array("I", range(count))
    random.Random(name).shuffle(order)
    return order


def _drawn(task: Task, epoch: int, start: int, end: int, seed: int) -> list[int]:
    """The examples at places start to end of a task's rows of an epoch.

    The task's examples stand in one order in a ring; an epoch takes the stretch after that of the epoch before, in an
    order of its own. Where it takes more than there are, each full turn is an order of its own.
    """
    found: list[int] = []
    for turn in range(start // task.size, math.ceil(end / task.size)):
        first = turn * task.size
        length = min(task.size, task.rows - first)
        inside = np.arange(max(start, first), min(end, first + length)) - first
        shuffled = permuted(inside, length, f"{seed}/{task.name}/{epoch}/{turn}")
        ring = (epoch * task.rows + first + shuffled) % task.size
        found += (task.first + permuted(ring, task.size, f"{seed}/{task.name}")).tolist()
    return found


def permuted(places: Places, count: int, name: str) -> Places:
    """Where the permutation of range(count) of that name puts `places`, without computing the rest of it.

    A Feistel network over a x b >= count (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): what
    falls outside is put through again. It takes no memory, and is the same for every version of any library.
    """
    left = math.isqrt(max(0, count - 1)) + 1
    sides = (left, -(-count // left))
    keys = _keys(name)
    found = _scrambled(places, sides, keys)
    outside = found >= count
    while outside.any():
        found[outside] = _scrambled(found[outside], sides, keys)
        outside = found >= count
    return found


def _scrambled(places: Places, sides: tuple[int, int], keys: tuple[int, ...]) -> Places:
    right: Places = places // sides[0]
    left: Places = places % sides[0]
    for key_left, key_right in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mixed_bits(right, key_left, sides[0])) % sides[0]
        right = (right + _mixed_bits(left, key_right, sides[1])) % sides[1]
    return right * sides[0] + left


def _mixed_bits(values: Places, key: int, below: int) -> Places:
    """A number below `below` for each value, by key: the finaliser of SplitMix64."""
    bits = values.astype(np.uint64) + np.uint64(key)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Places = ((bits ^ (bits >> np.uint64(31))) % np.uint64(below)).astype(np.int64)
    return found


@lru_cache(maxsize=256)
def _keys(name: str) -> tuple[int, ...]:
    """Two keys of 63 bits a round."""
    digest = hashlib.sha512(name.encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 1 for i in range(2 * _ROUNDS))
