"""Rows of logits for the tests of combiners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.experts.engine.batch import Floats

Doubles = npt.NDArray[np.float64]

values = st.floats(-50, 50, width=32)
two = hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(1, 20)), elements=values)
three = hnp.arrays(np.float32, st.tuples(st.just(3), st.integers(1, 20)), elements=values)


def softmax(logits: npt.ArrayLike) -> Doubles:
    """The textbook's, in double precision."""
    exponents: Doubles = np.exp(np.asarray(logits, np.float64))
    exponents /= exponents.sum()
    return exponents


def row(*logits: float) -> Floats:
    return np.array(logits, np.float32)


def drawn(seed: int, count: int, size: int = 8, spread: float = 2) -> list[Floats]:
    """Random rows."""
    random = np.random.default_rng(seed)
    return [(random.standard_normal(size) * spread).astype(np.float32) for _ in range(count)]


def likeliest(logits: Floats, count: int) -> Floats:
    """What a server tells: log-probabilities of the `count` likeliest tokens, and -inf."""
    told: Floats = np.full_like(logits, -np.inf)
    best: Sequence[int] = np.argsort(logits)[-count:].tolist()
    told[best] = np.log(softmax(logits))[best]
    return told
