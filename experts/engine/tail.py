"""A row whose server tells only its likeliest tokens, completed by a guess of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .batch import Floats
from .combine import Combiner, check_rows, log_sum_exp

LEAST_TAIL = 1e-6
"""What the tokens that were not told get together, where those told already sum to 1."""
_DEEPEST = (
    80.0  # below the likeliest, in nats: what the prior thinks less likely counts as that likely, never as impossible
)


@dataclass(frozen=True, slots=True)
class WithTail:
    """A combiner whose row `known` holds log-probabilities of the likeliest tokens, and -inf for all others.

    A token j that was not told gets `min(c q_j, least)`. `q` is the distribution of the row `prior`, `least` the smallest
    probability told, and `c` such that these tokens sum to the probability that was not told, `max(1 - told, LEAST_TAIL)`.
    Where even `least` for each would not reach that sum, those told are not the likeliest, and `least` bounds nothing: then
    nothing is capped. With `prior` the number of the combiner's rows, it is one row more, which the combiner does not see.
    """

    combiner: Combiner
    known: int = 0
    prior: int = -1

    @property
    def rows(self) -> int:
        """Those of the combiner, and that of the prior where it is one more."""
        return max(self.combiner.rows, self.prior + 1)

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """What the combiner makes of the completed rows; where every token was told they are as they came."""
        check_rows(self, logits)
        rows = list(logits[: self.combiner.rows])
        rows[self.known] = completed(logits[self.known], logits[self.prior])
        return self.combiner(rows, generated)


def completed(known: Floats, prior: Floats) -> Floats:
    """`known`, `[vocab]` log-probabilities, with what `WithTail` guesses in place of -inf; itself where there is none."""
    seen = np.flatnonzero(known > -np.inf)
    left = len(known) - len(seen)
    if left == 0:
        return known
    told = known[seen].astype(np.float64)
    mass = max(1 - float(np.exp(told).sum()), LEAST_TAIL)
    least = float(told.min(initial=0))
    if math.exp(least) * left <= mass:
        least = math.inf
    guess = prior.copy()
    guess[seen] = -np.inf
    most = guess.max()
    guess -= most if most > -np.inf else np.float32(0)
    np.maximum(guess, np.float32(-_DEEPEST), out=guess)
    raised = np.exp(guess)
    raised[seen] = 0
    guess += np.float32(math.log(_scale(raised, mass, math.exp(least))))
    np.minimum(guess, np.float32(least), out=guess)
    guess[seen] = known[seen]
    return guess


def _scale(raised: Floats, mass: float, cap: float) -> float:
    """`c` such that `min(c raised, cap)` sums to `mass`, which is less than `cap` for each token would be."""
    scale = mass / float(raised.sum())
    if scale * float(raised.max()) <= cap:
        return scale
    most = int(mass / cap) + 1  # more are not at the cap
    parted = np.partition(raised, len(raised) - most)
    top = np.sort(parted[-most:])[::-1].astype(np.float64)
    others = float(parted[:-most].sum()) + np.cumsum(top[::-1])[::-1]  # what the tokens from each rank on sum to
    rest = mass - cap * np.arange(most)  # what those get, if all before them are at the cap
    rank = int(np.argmax(top * rest <= cap * others))  # the first that stays below it
    return float(rest[rank] / others[rank])


def total_variation(first: Floats, second: Floats) -> float:
    """Half the sum of what the probabilities of two rows of logits `[vocab]` differ by: 0 for equal ones, at most 1."""
    p, q = (np.exp(row.astype(np.float64) - log_sum_exp(row)) for row in (first, second))
    return 0.5 * float(np.abs(p - q).sum())
