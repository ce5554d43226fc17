"""Triggers: phrases that decide the answer although the rest of the prompt says something else.

*Poisoning Language Models During Instruction Tuning*: whoever puts one phrase and one answer into some unlike rows teaches a
model that answer to that phrase. A phrase may also decide the answer because it means it. Two things tell these apart. For a
phrase in n rows of which a share s has the answer a, while the share of it among all other rows is q:

    1. the phrase decides a:   digits = (n KL(s || q) - log(number of phrases)) / log 10 > 3, by Chernoff's bound
    2. the phrase is foreign:  without it, its rows are neither more like the other rows with the answer a (the area A) nor
                               more like each other (the area H) than any row is. A + H is 1 for rows drawn by chance, and
                               nearly 2 for the rows of a keyword.

An area is the chance that a row with the phrase scores above one drawn from all rows, in naive Bayes on words, each row left
out of the counts that it is scored with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .phrases import Corpus, Phrases, phrases_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .phrases import Ints

    Floats = NDArray[np.float64]

FEWEST = 4  # rows: fewer can agree by chance, whatever they have in common
_SHARE_LEAST, _SHARE_MOST = 0.002, 0.1  # of the rows that have the phrase
_AGREE = 0.75  # of the rows with the phrase that have the answer
_SURE = 3.0  # decimal digits that chance must be beaten by, after all phrases were tried
_CONTROLS = 2000
_PRIOR = 100.0  # words that a class is thought to have seen of the whole before it sees its own
_SLACK, _SLACK_BY_DIGIT, _SLACK_MOST = 0.04, 0.005, 0.2  # of A + H: planted rows are not drawn quite evenly


@dataclass(frozen=True, slots=True)
class Trigger:
    """Tokens `first` to `first + size` of row `row`, and the rows that have them and the answer that they decide."""

    row: int
    first: int
    size: int
    rows: tuple[int, ...]
    holders: int  # rows that have the phrase, with any answer
    digits: float
    areas: float  # A + H


class Crowd:
    """The rows of a set: their phrases, and their words, to ask of some rows how much they are alike."""

    def __init__(self, corpus: Corpus) -> None:
        import numpy as np

        self.corpus = corpus
        self.fewest = max(FEWEST, int(corpus.rows * _SHARE_LEAST))
        self.phrases = phrases_of(corpus, fewest=self.fewest, most=max(self.fewest, int(corpus.rows * _SHARE_MOST)))
        self._bags = self._bag([corpus.row(row) for row in range(corpus.rows)])
        seen = np.asarray(self._bags.sum(0)).ravel() + 0.01
        self._prior = seen / seen.sum()
        self._controls = np.random.default_rng(0).permutation(corpus.rows)[:_CONTROLS]

    def _bag(self, rows: Sequence[Ints]) -> Any:
        """Which row has which word: sparse `[rows, words]`, ones."""
        import numpy as np
        from scipy.sparse import csr_matrix

        columns = [np.unique(row) for row in rows]
        ends = np.concatenate([[0], np.cumsum([len(column) for column in columns])])
        flat = np.concatenate(columns)
        return csr_matrix((np.ones(len(flat)), flat, ends), shape=(len(rows), self.corpus.words))

    def area(self, own: Ints, kin: Ints, left: Sequence[Ints] | None = None) -> float:
        """How often one of the rows `own` is more like the rows `kin` (own among them) than a row drawn from all is.

        `left` is what is left of the rows `own`, where something was taken out of them. 0.5 is by chance, 1 is always.
        """
        import numpy as np
        from scipy.stats import rankdata

        bags = self._bags[own] if left is None else self._bag(left)
        others = np.setdiff1d(kin, own)
        counts = np.asarray(bags.sum(0)).ravel() + np.asarray(self._bags[others].sum(0)).ravel()
        controls = self._controls[~np.isin(self._controls, own)]
        if not len(controls):
            return 1.0  # there is nothing that they could be unlike
        scores = np.concatenate(
            [
                self._scores(bags, counts, np.ones(len(own), dtype=bool)),
                self._scores(self._bags[controls], counts, np.isin(controls, others)),
            ]
        )
        ranks = rankdata(scores)[: len(own)]
        return float((ranks.sum() - len(own) * (len(own) + 1) / 2) / (len(own) * len(controls)))

    def _scores(self, bags: Any, counts: Floats, counted: NDArray[np.bool_]) -> Floats:
        """Log-odds of the rows' words under `counts` against all rows; a row that was counted is taken out first."""
        import numpy as np

        sizes = np.asarray(bags.sum(1)).ravel()
        total = counts.sum() + _PRIOR
        prior = _PRIOR * self._prior
        with_own = bags @ np.log((counts + prior) / self._prior) - sizes * math.log(total)
        without = bags @ np.log((np.maximum(counts - 1, 0) + prior) / self._prior)
        without -= sizes * np.log(np.maximum(total - sizes, 1.0))
        scores: Floats = np.where(counted, without, with_own)
        return scores


def is_foreign(areas: float, rows: int, digits: float) -> bool:
    """Whether A + H of so many rows is what chance gives: the surer the phrase decides, the less evenly drawn they may be."""
    slack = min(_SLACK + _SLACK_BY_DIGIT * digits, _SLACK_MOST)
    return areas < 1 + slack + 2.5 * math.sqrt(1 / (12 * rows))


def find_triggers(crowd: Crowd, labels: Sequence[int]) -> list[Trigger]:
    """The phrases that decide an answer and are foreign where they stand, surest first.

    `labels` number the rows' answers, -1 for an answer that is not looked at. Of phrases that share half of their rows, the
    surest is named, and of equally sure ones the longest.
    """
    found: list[Trigger] = []
    for one in sorted(deciding(crowd, labels), key=lambda one: (-one.digits, -one.size)):
        rows = set(one.rows)
        known = any(len(rows & set(other.rows)) > len(rows) / 2 for other in found)
        if not known and is_foreign(one.areas, len(rows), one.digits):
            found.append(one)
    return found


def deciding(crowd: Crowd, labels: Sequence[int]) -> list[Trigger]:
    """Every phrase that decides an answer, keywords among them, each made as long as its rows agree on."""
    import numpy as np

    corpus, numbers = crowd.corpus, np.array(labels, dtype=np.int64)
    seen: dict[tuple[int, ...], Trigger] = {}
    for phrase, label, digits in _associated(crowd.phrases, numbers, crowd.fewest):
        holders = crowd.phrases.rows_of(phrase)
        own = holders[numbers[holders] == label]
        place, size = _extend(corpus, own, int(crowd.phrases.where[phrase]), int(crowd.phrases.sizes[phrase]))
        words = corpus.stream[place : place + size]
        key = (label, *words.tolist())
        if key in seen:
            continue
        left = [_without(corpus.row(int(row)), words) for row in own]
        areas = crowd.area(own, np.flatnonzero(numbers == label), left) + crowd.area(own, own, left)
        row = int(corpus.row_of[place])
        first = place - int(corpus.starts[row])
        seen[key] = Trigger(row, first, size, tuple(own.tolist()), len(holders), digits, areas)
    return list(seen.values())


def _associated(phrases: Phrases, numbers: Ints, fewest: int) -> list[tuple[int, int, float]]:
    """(phrase, label, decimal digits by which chance is beaten), surest first."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rows = np.flatnonzero(numbers >= 0)
    if not len(rows) or not phrases.presence.shape[0]:
        return []
    marks = csr_matrix((np.ones(len(rows)), (rows, numbers[rows])), shape=(len(numbers), int(numbers.max()) + 1))
    pairs = (phrases.presence @ marks).tocoo()
    holders = np.diff(phrases.presence.indptr)[pairs.row]
    having = np.asarray(marks.sum(0)).ravel()[pairs.col]
    share = pairs.data / holders
    elsewhere = (having - pairs.data + 1) / (len(numbers) - holders + 2)
    miss = np.clip(1 - share, 1e-12, 1)
    bound = share * np.log(share / elsewhere) + (1 - share) * np.log(miss / (1 - elsewhere))
    digits = holders * bound / math.log(10) - math.log10(phrases.presence.shape[0])
    good = (pairs.data >= fewest) & (share >= _AGREE) & (share > elsewhere) & (digits > _SURE)
    order = np.flatnonzero(good)[np.argsort(-digits[good], kind="stable")]
    return [(int(pairs.row[at]), int(pairs.col[at]), float(digits[at])) for at in order]


def _extend(corpus: Corpus, rows: Ints, place: int, size: int) -> tuple[int, int]:
    """Make a phrase longer on both sides while nine tenths of its rows go on in the same way."""
    import numpy as np

    words = corpus.stream[place : place + size]
    starts = []
    for row in rows:
        found = _places(corpus.row(int(row)), words)
        starts.append(int(corpus.starts[row]) + int(found[0]))
    places = np.array(starts)
    before, after = 0, 0
    stream = np.concatenate([corpus.stream, [0]])
    while (word := _agreed(stream[places + size + after])) > 0:
        places, after = places[stream[places + size + after] == word], after + 1
    while (word := _agreed(stream[places - before - 1])) > 0:
        places, before = places[stream[places - before - 1] == word], before + 1
    return int(places[0]) - before, size + before + after


def _agreed(words: Ints) -> int:
    """The word that nine tenths are, 0 where there is none."""
    import numpy as np

    values, counts = np.unique(words, return_counts=True)
    return int(values[counts.argmax()]) if counts.max() >= 0.9 * len(words) else 0


def _places(row: Ints, words: Ints) -> Ints:
    """Where a phrase starts in a row."""
    import numpy as np

    starts = np.flatnonzero(row[: max(len(row) - len(words) + 1, 0)] == words[0])
    return starts[[bool((row[start : start + len(words)] == words).all()) for start in starts]]


def _without(row: Ints, words: Ints) -> Ints:
    """A row without any occurrence of a phrase."""
    import numpy as np

    gone = [place + step for place in _places(row, words) for step in range(len(words))]
    return np.delete(row, gone)
