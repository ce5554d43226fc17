"""From the logits of a request's rows to one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...errors import InvalidRequest
from .batch import Floats


class Combiner(Protocol):
    """How the rows of a request make one distribution. It lives for one answer, so it may keep state of that answer."""

    @property
    def rows(self) -> int:
        """How many rows it needs."""
        ...

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int]) -> Floats:
        """From `[vocab]` logits, one array a row, to `[vocab]` log-probabilities up to a constant.

        `generated` are the tokens of the answer so far. The result may be one of the arrays, none of which is changed.
        A row may hold -inf for a token that it does not allow or does not know; the result holds no NaN for it.
        Raises InvalidRequest where the number of rows is wrong, or their vocabularies differ.
        """
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """One row, as it is."""

    @property
    def rows(self) -> int:
        """One."""
        return 1

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z_1`."""
        check_rows(self, logits)
        return logits[0]


def log_sum_exp(logits: Floats) -> float:
    """`log sum_j exp(z_j)`: what logits exceed log-probabilities by. -inf where every token is."""
    most = logits.max()
    if most == -math.inf:
        return -math.inf
    return float(most + np.log(np.exp(logits - most).sum()))


def check_rows(combiner: Combiner, logits: Sequence[Floats]) -> None:
    """Raises InvalidRequest where `combiner` takes another number of rows, or their vocabularies differ."""
    if len(logits) != combiner.rows:
        raise InvalidRequest(
            f"{len(logits)} rows came, {type(combiner).__name__} combines {combiner.rows}.",
            hint="Give the request as many rows as its combiner needs.",
        )
    if len({row.shape for row in logits}) > 1:
        raise InvalidRequest(
            f"The rows' vocabularies differ: {[len(row) for row in logits]}.", hint="Take models of one family."
        )
