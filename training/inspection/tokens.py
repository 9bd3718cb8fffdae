"""How long rows are for the model, and what of them carries loss."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.data.encoding import Encoded, encode, split_rows, wants_chat
from training.data.rows import Example, Passage, Preference
from training.data.tokens import prompt_ids
from training.inspection.figures import Lengths
from training.section import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BINS = 24
# Beyond this ratio of the longest row to the median one, bins of one width would hold all rows in one.
_SKEWED = 12


class RowEncoder:
    """Encodes the rows of a source one by one, whole: nothing is cut, dropped or refused for its length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
        self._tokenizer = tokenizer
        chat = True if source.messages else source.chat
        self._chat = source.form != "text" and wants_chat(chat, tokenizer, str(Path(source.path)))

    def encode(self, example: Example) -> tuple[Encoded, ...]:
        """A row (or one for every answer, where each is learned by itself), both of a pair, or a text whole."""
        if isinstance(example, Passage):
            assert self._tokenizer.eos_token_id is not None
            ids = (*prompt_ids(self._tokenizer, example.text), int(self._tokenizer.eos_token_id))
            return (Encoded(ids, (False,) + (True,) * (len(ids) - 1)),)
        rows = (
            (example.chosen, example.rejected) if isinstance(example, Preference) else split_rows(example, self._chat)
        )
        return tuple(encode(self._tokenizer, row, self._chat) for row in rows)


class TokenCounts:
    """Lengths and target tokens of rows as they come, four bytes a row."""

    def __init__(self) -> None:
        self.lengths = array("i")
        self.num_tokens = 0
        self.num_targets = 0

    def add(self, rows: tuple[Encoded, ...]) -> None:
        """A row, or both of a pair; the longer one counts for the row's length."""
        self.lengths.append(max(len(row.ids) for row in rows))
        self.num_tokens += sum(len(row.ids) for row in rows)
        self.num_targets += sum(row.num_targets for row in rows)

    def num_longer(self, length: int) -> int:
        """Rows of more tokens than that."""
        return int(np.count_nonzero(np.asarray(self.lengths) > length))

    def summary(self) -> Lengths | None:
        """Order statistics and a histogram; None when there are no rows."""
        if not self.lengths:
            return None
        values = np.asarray(self.lengths)
        counts, edges = np.histogram(values, _edges(values))
        return Lengths(
            least=int(values.min()),
            median=float(np.median(values)),
            mean=round(float(values.mean()), 1),
            p95=float(np.percentile(values, 95)),
            most=int(values.max()),
            edges=tuple(float(edge) for edge in edges),
            counts=tuple(int(count) for count in counts),
        )


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of one width, or of one ratio where a few rows are far longer than the rest."""
    least, most = float(values.min()), float(values.max()) + 1
    if most > _SKEWED * float(np.median(values)):
        return np.unique(np.round(np.geomspace(max(1.0, least), most, _BINS + 1)))
    width = max(1.0, np.ceil((most - least) / _BINS))
    return np.arange(least, most + width, width)
