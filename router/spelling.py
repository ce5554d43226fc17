"""Typing errors, taken back as far as the encoder's own vocabulary knows better.

A BERT encoder cuts a mistyped word into pieces that mean nothing. So a prompt with words that neither the vocabulary nor the
prompts that the router learned from have is read twice, as it stands and with each such word replaced by the commonest one a
single edit away (Norvig, *How to Write a Spelling Corrector*, 2007), and the two embeddings are averaged: a term that is merely
rare keeps its own half.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from .head import Floats

SHORTEST = 4
"""Letters of a word that is looked at."""
LONGEST = 300
"""Characters of a text that is looked at: a longer one says enough beside its errors, and would take twice its time."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = re.compile(r"[A-Za-z]+")


class TextEncoder(Protocol):
    """What turns texts into embeddings."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode(self, texts: Sequence[str]) -> Floats:
        """Normalised embeddings [n, dimension]."""


class Spelling:
    """A vocabulary's idea of how words are written.

    `ranks` has whole words, smaller for commoner ones; `known` words are right, too, and never a correction.
    """

    def __init__(self, ranks: Mapping[str, int], known: Collection[str] = ()) -> None:
        self._ranks = ranks
        self._known = frozenset(known)
        self._nearest = lru_cache(maxsize=1 << 14)(self._look_up)

    @classmethod
    def of(cls, folder: Path, known: Collection[str] = ()) -> Self | None:
        """That of a model's WordPiece vocabulary, in which common words come first; None where it has another kind."""
        path = folder / "tokenizer.json"
        model = json.loads(path.read_text("utf-8"))["model"] if path.exists() else {}
        if model.get("type") != "WordPiece":
            return None
        words = [(word.lower(), rank) for word, rank in model["vocab"].items() if word.isalpha() and word.isascii()]
        return cls(dict(sorted(words, key=lambda item: -item[1])), known)  # of `May` and `may`, the commoner rank

    def correct(self, text: str) -> str:
        """The text with its likely errors taken back; the text itself where there are none, or it is long."""
        return text if len(text) > LONGEST else WORD.sub(lambda found: self._nearest(found[0]), text)

    def _look_up(self, word: str) -> str:
        lower = word.lower()
        if len(lower) < SHORTEST or lower in self._ranks or lower in self._known:
            return word
        return min((one for one in _edits(lower) if one in self._ranks), key=self._ranks.__getitem__, default=word)


class Forgiving:
    """An encoder that reads mistyped prompts twice."""

    def __init__(self, encoder: TextEncoder, spelling: Spelling) -> None:
        self._encoder = encoder
        self._spelling = spelling

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._encoder.dimension

    def encode(self, texts: Sequence[str]) -> Floats:
        """Normalised embeddings [n, dimension]; where a text has likely errors, the mean of it and of its correction."""
        corrected = [self._spelling.correct(text) for text in texts]
        twice = [at for at, (text, other) in enumerate(zip(texts, corrected, strict=True)) if text != other]
        vectors = self._encoder.encode([*texts, *(corrected[at] for at in twice)])
        out, again = vectors[: len(texts)], vectors[len(texts) :]
        out[twice] += again
        out[twice] /= np.linalg.norm(out[twice], axis=1, keepdims=True)
        return out


def words_of(texts: Iterable[str], least: int = 1) -> frozenset[str]:
    """The words, in small letters and long enough to be looked at, that occur `least` times."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()) if len(word) >= SHORTEST)
    return frozenset(word for word, count in counts.items() if count >= least)


def _edits(word: str) -> Iterator[str]:
    """Everything that one letter dropped, swapped with the next, replaced or inserted makes of the word."""
    for at in range(len(word) + 1):
        before, after = word[:at], word[at:]
        yield before + after[1:]
        yield before + after[1:2] + after[:1] + after[2:]
        for letter in LETTERS:
            yield before + letter + after[1:]
            yield before + letter + after
