"""Texts that are nearly the same, found among many without comparing all pairs.

A text is the set of its shingles (runs of `SHINGLE` characters). Two texts are as near as their resemblance,
|A and B| / |A or B| (*On the Resemblance and Containment of Documents*, 1997). The share of equal minima under random
hashes estimates it, so rows with equal minima in a band are compared, and their resemblance is then computed exactly. With
`BANDS` bands of `IN_BAND` minima a pair of resemblance s is compared with probability 1 - (1 - s^IN_BAND)^BANDS: 99.9 % at
0.9. *Deduplicating Training Data Makes Language Models Better* (2022) shows what duplicates cost.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 4
BANDS = 12
IN_BAND = 6
_AT_ONCE = 1024
_SLACK = 0.2
"""An estimate so far below the threshold is not computed exactly: at 0.9 it is off by more in one pair of ten million."""
_NUMBER = re.compile(r"\w*\d\w*|[ivx]{2,}|[vx]")
_rng = np.random.default_rng(1997)
_FACTORS = _rng.integers(1, 2**63, BANDS * IN_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _rng.integers(0, 2**63, BANDS * IN_BAND, dtype=np.uint64)
_PLACES = _rng.integers(1, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def plain(text: str) -> str:
    """The text in one form of its characters, one case and single spaces: equal here is equal to a reader."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Sketches:
    """The sketches of rows of one or more texts each, made once for several indexes.

    Two rows are near where each of their texts is, by at least `threshold`. A pair whose every text reaches the threshold
    reaches it together, too, so one sketch of all texts of a row finds it.
    """

    def __init__(self, rows: Sequence[Sequence[str]], threshold: float) -> None:
        self.texts = [tuple(map(plain, texts)) for texts in rows]
        self.threshold = threshold
        self._minima = [_minima(texts) for texts in self.texts]

    def bands(self, row: int) -> list[bytes]:
        """The row's minima, band by band."""
        return [values.tobytes() for values in self._minima[row].reshape(BANDS, IN_BAND)]

    def are_near(self, one: int, other: int) -> bool:
        """Whether each of the two rows' texts is near, computed exactly. Texts with different numbers never are."""
        if np.mean(self._minima[one] == self._minima[other]) < self.threshold - _SLACK:
            return False
        pairs = list(zip(self.texts[one], self.texts[other], strict=True))
        return all(a == b or (numbers(a) == numbers(b) and resemblance(a, b) >= self.threshold) for a, b in pairs)


class Neighbours:
    """Rows that were added, to be found by those that are near to them. Rows of different `key` are never near."""

    def __init__(self, sketches: Sketches) -> None:
        self._sketches = sketches
        self._added: dict[tuple[int, bytes, Hashable], list[int]] = defaultdict(list)

    def add(self, row: int, key: Hashable = None) -> None:
        """From now on `near` may name this row."""
        for band, minima in enumerate(self._sketches.bands(row)):
            self._added[band, minima, key].append(row)

    def near(self, row: int, key: Hashable = None) -> list[int]:
        """The rows added that are near to this one, in order."""
        bands = enumerate(self._sketches.bands(row))
        candidates = {other for band, minima in bands for other in self._added.get((band, minima, key), ())}
        return sorted(other for other in candidates if self._sketches.are_near(row, other))


def numbers(text: str) -> list[str]:
    """The words of a plain text that hold digits or are Roman numerals: type 1 is not type 2, nor type ii type iii."""
    return [word for word in re.findall(r"\w+", text) if _NUMBER.fullmatch(word)]


def resemblance(one: str, other: str) -> float:
    """|A and B| / |A or B| of the shingles of two plain texts; 1 for two empty ones."""
    a, b = _shingles(one), _shingles(other)
    if not len(a) and not len(b):
        return 1.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _shingles(words: str) -> NDArray[np.uint64]:
    """Hashes of a plain text's shingles, each once, sorted."""
    if not words:
        return np.empty(0, np.uint64)
    points = np.frombuffer(f" {words} ".ljust(SHINGLE).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    runs = len(points) - SHINGLE + 1
    hashes = np.zeros(runs, np.uint64)
    for place in range(SHINGLE):
        hashes += points[place : place + runs] * _PLACES[place]
    return np.unique(_mixed(hashes))


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit given (the finisher of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _minima(texts: Sequence[str]) -> NDArray[np.uint64]:
    """The least of the row's shingles under each hash; the same shingle in another text of the row is another one."""
    minima = np.full(BANDS * IN_BAND, np.iinfo(np.uint64).max, np.uint64)
    hashes = np.concatenate([_mixed(_shingles(text) + np.uint64(place)) for place, text in enumerate(texts)])
    for start in range(0, len(hashes), _AT_ONCE):
        part = hashes[start : start + _AT_ONCE]
        minima = np.minimum(minima, (_FACTORS[:, None] * part + _OFFSETS[:, None]).min(axis=1))
    return minima
