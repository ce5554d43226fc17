"""Phrases of texts: which runs of one to four words occur in which rows, counted level by level."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

LONGEST = 4
# Latin words, single signs of scripts without spaces, words of other scripts, any other sign: a Cyrillic letter within a Latin
# word and a sign without width are tokens of their own.
_TOKEN = re.compile(
    r"[0-9A-Za-z_\u00c0-\u024f]+(?:['\u2019][0-9A-Za-z_\u00c0-\u024f]+)*"
    r"|[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W0-9A-Za-z_\u00c0-\u024f\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+|[^\w\s]"
)
_BANDS, _IN_BAND = 12, 2  # minima of hashes: of texts that share 0.7, all but one in 3,000 are compared
_END = 0  # the token that stands after each row: no phrase reaches over it


def tokens(text: str) -> list[str]:
    """Words and single signs of a text, in small letters. A sign that cannot be seen is a token like any other."""
    return [token.lower() for token in _TOKEN.findall(text)]


def excerpt(text: str, first: int, size: int) -> str:
    """What is written from token `first` on, `size` tokens long; signs that cannot be seen by their number."""
    spans = [match.span() for match in _TOKEN.finditer(text)][first : first + size]
    return visible(text[spans[0][0] : spans[-1][1]])


def visible(text: str) -> str:
    """The text on one line, with each sign that cannot be seen written as its number (U+200B)."""
    return "".join(sign if sign.isprintable() else f"U+{ord(sign):04X}" for sign in " ".join(text.split()))


def first_alike(texts: Sequence[str], share: float) -> dict[str, str]:
    """For each text the first one that is nearly the same: of the pairs of words of both, they have `share` in common.

    Only texts with equal minima under random hashes are compared (*On the Resemblance and Containment of Documents*, 1997).
    """
    import numpy as np

    factors = np.random.default_rng(0).integers(1, 1 << 31, _BANDS * _IN_BAND, dtype=np.int64) * 2 + 1
    seen: dict[tuple[int, bytes], tuple[str, set[int]]] = {}
    first: dict[str, str] = {}
    for text in texts:
        words = tokens(text)
        pairs = {zlib.crc32(f"{one} {other}".encode()) for one, other in zip(words, [*words[1:], ""], strict=True)}
        hashes = np.fromiter(pairs, dtype=np.int64, count=len(pairs))[:, None] * factors % ((1 << 31) - 1)
        minima = hashes.min(axis=0, initial=1 << 31).reshape(_BANDS, _IN_BAND)
        bands = [(band, values.tobytes()) for band, values in enumerate(minima)]
        known = dict(seen[band] for band in bands if band in seen)
        near = (other for other, held in known.items() if len(pairs & held) >= share * len(pairs | held))
        first[text] = next(near, text)
        if first[text] == text:
            for band in bands:
                seen.setdefault(band, (text, pairs))
    return first


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows as one array of token numbers: row r is `stream[starts[r] : starts[r + 1] - 1]`, then a separator."""

    words: int  # how many different tokens there are
    stream: Ints
    starts: Ints
    row_of: Ints

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.starts) - 1

    def row(self, row: int) -> Ints:
        """The token numbers of a row."""
        return self.stream[self.starts[row] : self.starts[row + 1] - 1]


@dataclass(frozen=True, slots=True)
class Phrases:
    """The phrases that are in enough rows. `where[p]` is one place of phrase p in the stream, `sizes[p]` its length."""

    presence: Any  # sparse [phrases, rows], ones
    where: Ints
    sizes: Ints

    def rows_of(self, phrase: int) -> Ints:
        """The rows that have a phrase, in order."""
        import numpy as np

        start, end = self.presence.indptr[phrase : phrase + 2]
        return np.sort(self.presence.indices[start:end]).astype(np.int64)


def corpus_of(texts: Sequence[str]) -> Corpus:
    """Number the tokens of texts."""
    import numpy as np

    number: dict[str, int] = {"": _END}
    rows = [
        np.array([*(number.setdefault(token, len(number)) for token in tokens(text)), _END], dtype=np.int64)
        for text in texts
    ]
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    return Corpus(len(number), np.concatenate(rows), starts, np.repeat(np.arange(len(rows)), sizes))


def phrases_of(corpus: Corpus, *, fewest: int, most: int) -> Phrases:
    """Find the phrases of one to four tokens that are in `fewest` to `most` rows.

    A phrase can only be frequent where both phrases that are a token shorter are, so rare ones are dropped before they grow.
    """
    import numpy as np
    from scipy.sparse import csr_matrix, vstack

    levels = [
        (presence[few], where[few], np.full(int(few.sum()), size, dtype=np.int64))
        for size, (presence, where) in enumerate(_levels(corpus, fewest), 1)
        for few in [np.diff(presence.indptr) <= most]
    ]
    presences, wheres, sizes = zip(*levels, strict=True)
    return Phrases(csr_matrix(vstack(presences)), np.concatenate(wheres), np.concatenate(sizes))


def _levels(corpus: Corpus, fewest: int) -> Iterator[tuple[Any, Ints]]:
    """For phrases of 1, 2, 3, 4 tokens: which rows have them (sparse `[phrases, rows]`), and a place of each."""
    import numpy as np

    stream, grams = corpus.stream, np.where(corpus.stream == _END, -1, corpus.stream)
    for size in range(1, LONGEST + 1):
        grams, presence, where = _frequent(grams, corpus, fewest)
        yield presence, where
        longer = np.full_like(grams, -1)
        end = max(len(grams) - size, 0)
        fits = (grams[:end] >= 0) & (grams[1 : end + 1] >= 0) & (stream[size:] != _END)
        longer[:end][fits] = grams[:end][fits] * corpus.words + stream[size:][fits]
        grams = longer


def _frequent(grams: Ints, corpus: Corpus, fewest: int) -> tuple[Ints, Any, Ints]:
    """Number the grams that are in enough rows from 0 on, all others -1; and say in which rows they are."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rows = corpus.rows
    places = np.flatnonzero(grams >= 0)
    keys, first, number = np.unique(grams[places], return_index=True, return_inverse=True)
    pairs = np.unique(number * rows + corpus.row_of[places])
    enough = np.bincount(pairs // rows, minlength=len(keys)) >= fewest
    renumbered = np.where(enough, np.cumsum(enough) - 1, -1)
    out = np.full_like(grams, -1)
    out[places] = renumbered[number]
    pairs = pairs[enough[pairs // rows]]
    shape = (int(enough.sum()), rows)
    presence = csr_matrix((np.ones(len(pairs)), (renumbered[pairs // rows], pairs % rows)), shape=shape)
    return out, presence, places[first[enough]]
