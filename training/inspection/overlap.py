"""Which items of a suite also stand in other rows, after published decontamination practice.

An item is found in a row when at least 70 % of its 8-grams of words are there (PaLM, arXiv 2204.02311), in one and
the same row (as for Tulu 3, arXiv 2411.15124), and so is its answer: a known question with another answer gives
nothing away. 8-grams that many prompts share are templates and count for nothing (GPT-3, arXiv 2005.14165, appendix
C, leaves out what stands in more than ten documents). An item of plain text may stand in several rows, since
documents are cut into pieces. Items with fewer words than an 8-gram are compared whole, prompt and answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from training.inspection.samples import Sample
from training.inspection.words import Hashes, hash_grams, hash_text, normalise, split_words

GRAM = 8
FOUND_SHARE = 0.7
TEMPLATE_PROMPTS = 10
_MAX_ROWS_PER_GRAM = 64

Grams = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """An item and the row that holds most of it: the share of its 8-grams there, and whether its answer is too."""

    item: Sample
    row: str
    share: float
    with_answer: bool


@dataclass
class _Item:
    """An item's 8-grams as numbers of the index, in order; those from `answer_start` on lie in the answer alone.

    `rows` and `learned` hold, by row, which of them stand in it, and which in what is learned of it.
    """

    sample: Sample
    suite: str
    grams: Grams
    answer_start: int
    answer: str
    rows: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    learned: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    rows_with_answer: set[int] = field(default_factory=set)

    @property
    def has_long_answer(self) -> bool:
        return self.answer_start < len(self.grams)


class SuiteIndex:
    """The 8-grams of all suites, small beside the rows that are then read one by one and not kept."""

    def __init__(self, suites: Mapping[str, Sequence[Sample]]) -> None:
        self._short: dict[tuple[str, str], list[tuple[str, Sample]]] = defaultdict(list)
        self._found_whole: dict[tuple[str, str], str] = {}
        long: list[tuple[str, Sample, Hashes, int, str]] = []
        for suite, samples in suites.items():
            for sample in samples:
                words, answer = split_words(sample.text), split_words(sample.answer)
                if len(words) < GRAM:
                    self._short[_whole(sample)].append((suite, sample))
                else:
                    start = len(words) - len(answer)
                    long.append((suite, sample, hash_grams(words, GRAM), start, " ".join(answer)))
        every = np.concatenate([hashes for _, _, hashes, _, _ in long]) if long else np.empty(0, np.uint64)
        self._grams: Hashes = np.unique(every)
        self._items = [
            _Item(sample, suite, np.searchsorted(self._grams, hashes), start, answer)
            for suite, sample, hashes, start, answer in long
        ]
        held = [np.unique(item.grams) for item in self._items]
        owners = np.repeat(np.arange(len(held)), [len(grams) for grams in held])
        together = np.concatenate(held) if held else np.empty(0, np.int64)
        order = np.argsort(together, kind="stable")
        # The items that hold gram g are _owners[_starts[g] : _starts[g + 1]].
        self._owners = owners[order]
        self._starts = np.searchsorted(together[order], np.arange(len(self._grams) + 1))
        self._suite_templates = {suite: self._find_templates(suite) for suite in suites}
        self._prompts_of: dict[int, set[bytes]] = defaultdict(set)
        self._num_rows_of = np.zeros(len(self._grams), np.int64)
        self._wanted = np.ones(len(self._grams), bool)
        self._prompts: set[bytes] = set()
        self._places: dict[int, str] = {}
        self._num_rows = 0

    def add(self, row: Sample) -> None:
        """Look for every item in a row."""
        self._num_rows += 1
        words = split_words(row.text)
        self._count_prompt(row)
        if len(words) < GRAM:
            whole = _whole(row)
            if whole in self._short:  # or every short row would be kept
                self._found_whole.setdefault(whole, row.where)
        elif len(self._grams):
            self._note(row, self._hits(hash_grams(words, GRAM)))

    def found(self, suite: str) -> list[Found]:
        """The items of a suite that stand in the rows added so far, in the suite's order; the fullest row of each."""
        whole = {
            id(sample): Found(sample, self._found_whole[key], 1.0, True)
            for key, items in self._short.items()
            if key in self._found_whole
            for name, sample in items
            if name == suite
        }
        return [*whole.values(), *filter(None, (self._judge(item) for item in self._items if item.suite == suite))]

    def _hits(self, hashes: Hashes) -> list[int]:
        """The grams of the index that a row holds and that are not known for templates yet."""
        places = np.minimum(np.searchsorted(self._grams, hashes), len(self._grams) - 1)
        known = places[(self._grams[places] == hashes) & self._wanted[places]]
        return [int(gram) for gram in np.unique(known)]

    def _note(self, row: Sample, hits: list[int]) -> None:
        if not hits:
            return
        prompt = hash_text(normalise(row.prompt or row.text))
        words = split_words(f"{row.answer}\n{row.rejected}")
        learned_text, learned = f" {' '.join(words)} ", set(self._hits(hash_grams(words, GRAM)))
        for gram in hits:
            self._prompts_of[gram].add(prompt)
            self._num_rows_of[gram] += 1
            too_common = len(self._prompts_of[gram]) > TEMPLATE_PROMPTS
            self._wanted[gram] = not too_common and self._num_rows_of[gram] < _MAX_ROWS_PER_GRAM
            for number in self._owners[self._starts[gram] : self._starts[gram + 1]]:
                item = self._items[number]
                item.rows[self._num_rows].add(gram)
                if gram in learned:
                    item.learned[self._num_rows].add(gram)
                if not item.has_long_answer and f" {item.answer} " in learned_text:
                    item.rows_with_answer.add(self._num_rows)
        self._places[self._num_rows] = row.where

    def _count_prompt(self, row: Sample) -> None:
        """Up to the number of distinct prompts from which on the template limit stays the same."""
        if len(self._prompts) <= TEMPLATE_PROMPTS**2:
            self._prompts.add(hash_text(normalise(row.prompt or row.text)))

    def _find_templates(self, suite: str) -> NDArray[np.bool_]:
        """Which grams many distinct items of a suite hold."""
        distinct = {hash_text(normalise(i.sample.text)): np.unique(i.grams) for i in self._items if i.suite == suite}
        held = np.concatenate([np.empty(0, np.int64), *distinct.values()])
        return np.bincount(held, minlength=len(self._grams)) > _template_limit(len(distinct))

    def _judge(self, item: _Item) -> Found | None:
        """The item's fullest row, if it holds enough; a row with the answer goes before one without."""
        if not item.rows:
            return None
        telling = self._telling(item)
        if not item.sample.prompt:
            return self._judge_text(item, telling)
        matches = [self._match(item, row, grams, telling) for row, grams in item.rows.items()]
        best = max(matches, key=lambda match: (match.with_answer, match.share))
        return best if best.share >= FOUND_SHARE else max(matches, key=_share, default=best)

    def _judge_text(self, item: _Item, telling: NDArray[np.bool_]) -> Found | None:
        """Plain text, of which all rows together may hold the pieces; given away where it is learned, not only read."""
        for rows, with_answer in ((item.learned, True), (item.rows, False)):
            share = _share_of(item.grams, set().union(*rows.values()), telling)
            if share >= FOUND_SHARE:
                row = max(rows, key=lambda row: len(rows[row]))
                return Found(item.sample, self._places[row], share, with_answer)
        return None

    def _match(self, item: _Item, row: int, grams: set[int], telling: NDArray[np.bool_]) -> Found:
        with_answer = row in item.rows_with_answer
        if item.has_long_answer:
            answer = np.arange(len(item.grams)) >= item.answer_start
            of_answer = answer & telling if (answer & telling).any() else answer
            with_answer = _share_of(item.grams, item.learned.get(row, set()), of_answer) >= FOUND_SHARE
        return Found(item.sample, self._places[row], _share_of(item.grams, grams, telling), with_answer)

    def _telling(self, item: _Item) -> NDArray[np.bool_]:
        """Which of an item's grams tell it from others: no templates, nor, where enough are left, what touches one."""
        limit = _template_limit(len(self._prompts))
        prompts = np.array([len(self._prompts_of.get(gram, ())) for gram in item.grams.tolist()])
        template = self._suite_templates[item.suite][item.grams] | (prompts > limit)
        inside = np.ones(len(template) + GRAM - 1, bool)
        for start in np.flatnonzero(template):
            inside[start : start + GRAM] = False
        clear = np.all(np.lib.stride_tricks.sliding_window_view(inside, GRAM), axis=1)
        return clear if np.count_nonzero(clear) >= GRAM else np.logical_not(template)


def find_overlap(suites: Mapping[str, Sequence[Sample]], rows: Iterable[Sample]) -> dict[str, list[Found]]:
    """By suite, its items of which at least FOUND_SHARE stands in the rows, with or without the answer."""
    index = SuiteIndex(suites)
    for row in rows:
        index.add(row)
    return {suite: [found for found in index.found(suite) if found.share >= FOUND_SHARE] for suite in suites}


def _share(found: Found) -> float:
    return found.share


def _whole(sample: Sample) -> tuple[str, str]:
    return normalise(sample.prompt), normalise(sample.answer)


def _template_limit(num_texts: int) -> int:
    """In how many distinct prompts a gram may stand: ten, or a tenth of a small number of them, at least two."""
    return min(TEMPLATE_PROMPTS, max(2, num_texts // 10))


def _share_of(grams: Grams, held: set[int], which: NDArray[np.bool_]) -> float:
    wanted = grams[which].tolist()
    return sum(gram in held for gram in wanted) / len(wanted) if wanted else 0.0
