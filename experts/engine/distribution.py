"""Logits as probabilities: temperature, filters, draw.

In the order of transformers: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import CollegiumError
from ...schema import Sampling
from .batch import Floats

COLDEST = 0.01
"""Temperatures below it are greedy: dividing logits by them would overflow."""
BLOCK = 256
"""Weights are summed in blocks of this many for a draw: a running sum over a whole vocabulary is ten times slower."""


def distribution(logits: Floats, sampling: Sampling) -> Floats:
    """The probabilities `[vocab]` that a token is drawn from, 0 for those filtered out; temperature from COLDEST up.

    As in transformers, top-k keeps all that equal the k-th; top-p keeps no more than it needs, of equal ones the lower
    ids (transformers keeps any of them), and the likeliest in any case.
    """
    with np.errstate(over="ignore"):  # what is that far below the likeliest is never drawn
        weights: Floats = np.exp((logits - logits.max()) / sampling.temperature)
    if 0 < sampling.top_k < len(logits):
        weights *= logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p < 1:
        _keep_nucleus(weights, logits, sampling.top_p)
    if sampling.min_p > 0:
        weights *= weights >= sampling.min_p
    weights /= weights.sum()
    return weights


def _keep_nucleus(weights: Floats, logits: Floats, top_p: float) -> None:
    """Make 0, from the least on, the weights that come to at most `1 - top_p` of all of them."""
    total = float(weights.sum())
    # So light that even a whole vocabulary of them would come to less: these need no sorting.
    ids = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    ids = ids[np.argsort(logits[ids])]
    running = total - weights[ids].sum() + np.cumsum(weights[ids], dtype=np.float64)
    kept = logits[ids[min(int(running.searchsorted(total * (1 - top_p), "right")), len(ids) - 1) :]]
    weights *= logits >= kept[0]
    equal = np.flatnonzero(logits == kept[0])
    weights[equal[np.count_nonzero(kept == kept[0]) :]] = 0


def likeliest(logits: Floats, most: int) -> list[int]:
    """The ids of the `most` likeliest tokens, best first; of equal ones, the lower id."""
    most = min(most, len(logits))
    if not most:
        return []
    ids = np.flatnonzero(logits >= np.partition(logits, -most)[-most])
    return [int(one) for one in ids[np.argsort(-logits[ids], kind="stable")[:most]]]


def best(logits: Floats) -> int:
    """The likeliest token. Raises CollegiumError where none is, or where a value is no number."""
    best = int(logits.argmax())  # a NaN counts as the greatest
    if np.isfinite(logits[best]):
        return best
    if logits[best] == -np.inf:
        raise CollegiumError(
            "No token is allowed.", hint="The grammar leaves none: allow the end token, or more answers."
        )
    raise CollegiumError(
        "The model gave logits that are not finite numbers.", hint="Check its weights and its precision."
    )


def pick(weights: Floats, random: np.random.Generator) -> int:
    """A place, drawn by its weight: first its block, then the place in it."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    start = _place(blocks, random.random()) * BLOCK
    return start + _place(weights[start : start + BLOCK], random.random())


def _place(weights: npt.NDArray[np.floating], at: float) -> int:
    """Where the running sum first exceeds the share `at` (below 1) of the whole; never a place of weight 0."""
    running = np.cumsum(weights, dtype=np.float64)
    return int(running.searchsorted(at * running[-1], "right"))
