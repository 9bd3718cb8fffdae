"""Rows that repeat others, word for word or nearly, among all that a run learns from.

Nearly means a Jaccard similarity of at least 0.75 between the sets of words and pairs of neighbouring words: in a row
of fifteen words one may differ. Templates are left out first: 5-grams that stand in more than a twentieth of all rows
(and in more than ten). Candidates come from MinHash and LSH with 128 permutations (as in arXiv 2107.06499) of
datasketch; their similarity is then computed exactly.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH

from training.inspection.samples import Sample
from training.inspection.words import Hashes, hash_text, hash_words, join_grams, normalise, split_words

SIMILARITY = 0.75
MIN_WORDS = 5
_PERMUTATIONS = 128
_TEMPLATE_GRAM = 5
_TEMPLATE_ROWS = 10
_TEMPLATE_SHARE = 0.05
_BUCKETS = 2**20


@dataclass(frozen=True)
class Pair:
    """A row and an earlier one that it repeats; the similarity is 1 when they are the same."""

    row: str
    earlier: str
    similarity: float


@dataclass
class Duplicates:
    """What was found. Rows are told apart by the part that they stand in."""

    repeated: list[Pair] = field(default_factory=list)
    near: list[Pair] = field(default_factory=list)
    disagreeing: list[Pair] = field(default_factory=list)
    num_repeated: Counter[str] = field(default_factory=Counter)
    num_near: Counter[str] = field(default_factory=Counter)
    num_disagreeing: int = 0


class DuplicateSearch:
    """Takes rows one by one; of each it keeps digests in memory, and the hashes of its words in a temporary file."""

    def __init__(self, most_shown: int) -> None:
        self._most_shown = most_shown
        self._first: dict[bytes, str] = {}
        self._answers: dict[bytes, tuple[str, bytes]] = {}
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with the search
        self._rows: list[tuple[str, str]] = []
        self._ends = [0]
        self._held_by = np.zeros(_BUCKETS, np.int32)
        self._found = Duplicates()

    def add(self, part: str, sample: Sample) -> None:
        """A row of a part."""
        digest = hash_text("\0".join((sample.system, sample.prompt, sample.answer, sample.rejected)))
        earlier = self._first.setdefault(digest, sample.where)
        if earlier is not sample.where:
            self._found.num_repeated[part] += 1
            self._keep(self._found.repeated, Pair(sample.where, earlier, 1.0))
            return
        self._compare_answers(sample)
        words = hash_words(split_words(sample.text))
        self._words.write(words.tobytes())
        self._rows.append((part, sample.where))
        self._ends.append(self._ends[-1] + len(words))
        self._held_by[np.unique(join_grams(words, _TEMPLATE_GRAM) % _BUCKETS)] += 1

    def found(self) -> Duplicates:
        """Everything, once all rows were added."""
        lsh = MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)
        empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        for number, (part, where) in enumerate(self._rows):
            features = self._features(number)
            if len(features) < 2 * MIN_WORDS - 1:
                continue
            sketch = empty.copy()
            sketch.update_batch((features >> np.uint64(32)).tolist())
            best = max(((_jaccard(features, self._features(n)), n) for n in lsh.query(sketch)), default=(0.0, -1))
            if best[0] >= SIMILARITY:
                self._found.num_near[part] += 1
                self._keep(self._found.near, Pair(where, self._rows[best[1]][1], round(best[0], 4)))
            else:
                lsh.insert(number, sketch, check_duplication=False)
        return self._found

    def _features(self, number: int) -> Hashes:
        """The distinct words and pairs of words of a row, without templates."""
        start, end = self._ends[number : number + 2]
        self._words.seek(8 * start)
        words: Hashes = np.frombuffer(self._words.read(8 * (end - start)), np.uint64)
        limit = max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(self._rows))
        told = np.ones(len(words), bool)
        for place in np.flatnonzero(self._held_by[join_grams(words, _TEMPLATE_GRAM) % _BUCKETS] > limit):
            told[place : place + _TEMPLATE_GRAM] = False
        return np.unique(np.concatenate([words[told], join_grams(words[told], 2)]))

    def _compare_answers(self, sample: Sample) -> None:
        if not sample.prompt.strip():
            return
        prompt = hash_text(normalise(f"{sample.system}\0{sample.prompt}"))
        answer = hash_text(normalise(sample.answer))
        earlier, other = self._answers.setdefault(prompt, (sample.where, answer))
        if other != answer:
            self._found.num_disagreeing += 1
            self._keep(self._found.disagreeing, Pair(sample.where, earlier, 0.0))

    def _keep(self, pairs: list[Pair], pair: Pair) -> None:
        if len(pairs) < self._most_shown:
            pairs.append(pair)


def _jaccard(a: Hashes, b: Hashes) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
