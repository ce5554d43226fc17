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
    """How the rows of a request make one distribution."""

    @property
    def rows(self) -> int:
        """How many rows it needs."""
        ...

    def __call__(self, logits: Sequence[Floats]) -> Floats:
        """From `[vocab]` logits, one array a row, to `[vocab]` log-probabilities up to a constant.

        The result may be one of the arrays, none of which is changed. Raises InvalidRequest where their number is wrong, or
        their vocabularies differ.
        """
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """One row, as it is."""

    @property
    def rows(self) -> int:
        """One."""
        return 1

    def __call__(self, logits: Sequence[Floats]) -> Floats:
        """`z_1`."""
        _check_rows(self, logits)
        return logits[0]


@dataclass(frozen=True, slots=True)
class LogitArithmetic:
    """A large model steered by what tuning changed in a small one. Rows: base, tuned, untuned.

    `z = base + alpha (tuned - untuned)`: proxy-tuning (Liu et al. 2024, "Tuning Language Models by Proxy"), after DExperts
    (Liu et al. 2021, "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts").
    """

    alpha: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InvalidRequest(f"alpha is {self.alpha}.", hint="Give a number from 0 (the base model alone) upwards.")

    @property
    def rows(self) -> int:
        """Three."""
        return 3

    def __call__(self, logits: Sequence[Floats]) -> Floats:
        """`z` of the class."""
        _check_rows(self, logits)
        base, tuned, untuned = logits
        combined = tuned - untuned
        combined *= self.alpha
        combined += base
        return combined


@dataclass(frozen=True, slots=True)
class ProbabilityMixture:
    """The weighted mean of the rows' probabilities. `weights`, one a row, sum to 1.

    `z = log sum_i w_i softmax(z_i)`: the ensemble of DEMix (Gururangan et al. 2022, "DEMix Layers: Disentangling Domains
    for Modular Language Modeling"), whose weights are the experts' posterior, and the constant combination of CombLM
    (Ormazabal et al. 2023, "CombLM: Adapting Black-Box Language Models through Small Fine-Tuned Models").
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (all(weight >= 0 for weight in self.weights) and math.isclose(sum(self.weights), 1, abs_tol=1e-6)):
            raise InvalidRequest(f"The weights are {self.weights}.", hint="Give weights from 0 that sum to 1.")

    @property
    def rows(self) -> int:
        """As many as weights."""
        return len(self.weights)

    def __call__(self, logits: Sequence[Floats]) -> Floats:
        """`z` of the class, by log-sum-exp over the rows, so that no probability is too small for it."""
        _check_rows(self, logits)
        terms = [
            row + np.float32(math.log(weight) - log_sum_exp(row))
            for weight, row in zip(self.weights, logits, strict=True)
            if weight > 0
        ]
        # A token that no row allows is -inf in all of them, and -inf less itself would not be a number.
        most = np.maximum.reduce(terms).clip(np.finfo(np.float32).min)
        with np.errstate(divide="ignore"):
            combined: Floats = np.log(sum(np.exp(term - most) for term in terms)) + most
        return combined


def log_sum_exp(logits: Floats) -> float:
    """`log sum_j exp(z_j)`: what logits exceed log-probabilities by."""
    most = logits.max()
    return float(most + np.log(np.exp(logits - most).sum()))


def _check_rows(combiner: Combiner, logits: Sequence[Floats]) -> None:
    if len(logits) != combiner.rows:
        raise InvalidRequest(
            f"{len(logits)} rows came, {type(combiner).__name__} combines {combiner.rows}.",
            hint="Give the request as many rows as its combiner needs.",
        )
    if len({row.shape for row in logits}) > 1:
        raise InvalidRequest(
            f"The rows' vocabularies differ: {[len(row) for row in logits]}.", hint="Take models of one family."
        )
