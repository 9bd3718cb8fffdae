"""The languages of a bounded, seeded sample of rows."""

from __future__ import annotations

import random
from collections import Counter

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from training.inspection.figures import Languages, Share

SAMPLED = 500
_CHARACTERS = 1000
_MIN_LETTERS = 20
_MIN_PROBABILITY = 0.8


class LanguageSample:
    """Texts drawn evenly from a stream of unknown length (reservoir sampling)."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._texts: list[str] = []
        self._seen = 0

    def add(self, text: str) -> None:
        """A row's text."""
        self._seen += 1
        if len(self._texts) < SAMPLED:
            self._texts.append(text[:_CHARACTERS])
        elif (place := self._random.randrange(self._seen)) < SAMPLED:
            self._texts[place] = text[:_CHARACTERS]

    def found(self, identifier: LanguageIdentifier) -> Languages:
        """The languages of the sample, the commonest first."""
        counts = Counter(_language_of(text, identifier) for text in self._texts)
        unclear = counts.pop("", 0)
        found = tuple(Share(name=name, count=count) for name, count in counts.most_common())
        return Languages(sampled=len(self._texts), unclear=unclear, found=found)


def load_identifier() -> LanguageIdentifier:
    """The identifier of py3langid with its packaged model of 97 languages."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language_of(text: str, identifier: LanguageIdentifier) -> str:
    """A language's code, or nothing where the text is too short or unclear."""
    if sum(map(str.isalpha, text)) < _MIN_LETTERS:
        return ""
    name, probability = identifier.classify(text)
    return str(name) if probability >= _MIN_PROBABILITY else ""
