"""Mixtures of the rows' probabilities: constant, by the experts' posterior, and learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InvalidRequest
from .batch import Floats
from .combine import check_rows

SHARE = 1e-4
"""The part of a posterior that goes back to the prior with every token."""
FEATURES = (
    "bias",
    "large entropy",
    "tuned entropy",
    "large log max",
    "tuned log max",
    "agreement",
    "large at tuned's best",
    "tuned at large's best",
)
"""What `features` measures, in order. Entropies are in nats; the last four of logarithms are natural, from -30."""

_DEEPEST = -80.0  # exp of it is a normal float32; what lies deeper has no weight in a sum
_FAINT = 1e-30  # a probability below it was summed from terms that are not precise, or lost
_LEAST_LOG = -30.0

Doubles = npt.NDArray[np.float64]


class _Normal:
    """One row's distribution: `raised` `[vocab]` sums to `total`, and is 1 at the likeliest token.

    It holds the row itself, which must not change as long as it lives.
    """

    __slots__ = ("_logits", "_most", "log_total", "raised", "total")

    def __init__(self, logits: Floats) -> None:
        most = logits.max()
        self._logits, self._most = logits, most if most > -math.inf else np.float32(0)
        self.raised: Floats = logits - self._most
        np.maximum(self.raised, np.float32(_DEEPEST), out=self.raised)
        np.exp(self.raised, out=self.raised)
        self.total = float(self.raised.sum())
        self.log_total = math.log(self.total)

    def logprobs(self, tokens: npt.NDArray[np.intp]) -> Doubles:
        """Of some tokens; -inf where one is forbidden."""
        return (self._logits[tokens] - self._most) - np.float64(self.log_total)

    def logprob(self, token: int) -> float:
        """Of one token; -inf where it is forbidden."""
        return float(self._logits[token] - self._most) - self.log_total

    @property
    def best(self) -> int:
        """The likeliest token."""
        return int(self._logits.argmax())

    @property
    def entropy(self) -> float:
        """In nats."""
        return self.log_total - float(np.dot(self.raised, np.log(self.raised))) / self.total


@dataclass(frozen=True, slots=True)
class ProbabilityMixture:
    """The weighted mean of the rows' probabilities. `weights`, one a row, sum to 1, or InvalidRequest is raised.

    `z = log sum_i w_i softmax(z_i)`: the constant combination of CombLM (Ormazabal et al. 2023, "CombLM: Adapting Black-Box
    Language Models through Small Fine-Tuned Models").
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    @property
    def rows(self) -> int:
        """As many as weights."""
        return len(self.weights)

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z` of the class; the row itself where one has all the weight."""
        check_rows(self, logits)
        sole = _sole(self.weights)
        return _mixed([_Normal(row) for row in logits], self.weights) if sole is None else logits[sole]


class PosteriorMixture:
    """The mean of the rows' probabilities, each row weighted by how well it foretold the answer so far.

    `z_t = log sum_i w_t(i) softmax(z_t,i)`, where after a token x `w_t+1 = (1 - SHARE) posterior + SHARE prior` with
    `posterior(i)` in proportion to `w_t(i) p_i(x)`: the ensemble of DEMix (Gururangan et al. 2022, "DEMix Layers: Disentangling
    Domains for Modular Language Modeling", section 5). Of its priors this is the fixed one, refreshed with every token by a small
    share (Herbster & Warmuth 1998, "Tracking the Best Expert"): Bayes' rule where the best expert may change in mid-answer, so
    that none is lost for good. It keeps the state of one answer. `prior`, one a row, sums to 1, or InvalidRequest is raised.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        _check_weights(prior)
        self._prior: Doubles = np.asarray(prior, np.float64)
        self._weights = self._prior
        self._last: list[_Normal] = []
        self._read = 0

    @property
    def rows(self) -> int:
        """As many as the prior has weights."""
        return len(self._prior)

    @property
    def posterior(self) -> tuple[float, ...]:
        """The weights that the last call mixed with; the prior before the first."""
        return tuple(self._weights.tolist())

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z` of the class; the row itself where the prior has one alone.

        `generated` grows by one token a call. Without any an answer begins anew. Raises InvalidRequest for another length.
        """
        check_rows(self, logits)
        sole = _sole(self.posterior)
        if sole is not None:
            return logits[sole]
        self._follow(generated)
        self._last, self._read = [_Normal(row) for row in logits], len(generated)
        return _mixed(self._last, self.posterior)

    def _follow(self, generated: Sequence[int]) -> None:
        if not generated:
            self._weights = self._prior
        elif self._last and len(generated) == self._read + 1:
            self._weights = self._updated(generated[-1])
        else:
            raise InvalidRequest(
                f"The answer has {len(generated)} tokens, {self._read} were read.",
                hint="Make a PosteriorMixture for each answer, and call it once a token.",
            )

    def _updated(self, token: int) -> Doubles:
        with np.errstate(divide="ignore"):  # a weight of 0 in the prior stays 0
            evidence = np.log(self._weights) + [row.logprob(token) for row in self._last]
        most = evidence.max()
        if most == -math.inf:  # no row allows the token: it tells nothing
            return self._weights
        posterior = np.exp(evidence - most)
        weights: Doubles = (1 - SHARE) * posterior / posterior.sum() + SHARE * self._prior
        return weights


@dataclass(frozen=True, slots=True)
class LearnedMixture:
    """A mean of the two rows' probabilities, with a weight that is learned from how sure each is. Rows: large, tuned.

    `z = log(l softmax(large) + (1 - l) softmax(tuned))`, `l = sigmoid(weights . features(large, tuned))`: CombLM (Ormazabal
    et al. 2023, "CombLM: Adapting Black-Box Language Models through Small Fine-Tuned Models"), with a linear model in place of
    its small network. Raises InvalidRequest where there is not one finite weight for each of `FEATURES`.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(FEATURES) or not all(map(math.isfinite, self.weights)):
            raise InvalidRequest(
                f"The weights are {self.weights}.", hint=f"Give {len(FEATURES)} finite ones: {', '.join(FEATURES)}."
            )

    @property
    def rows(self) -> int:
        """Two."""
        return 2

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z` of the class; the row itself where it gets all the weight."""
        check_rows(self, logits)
        large, tuned = (_Normal(row) for row in logits)
        score = float(np.dot(np.asarray(self.weights), _features(large, tuned)))
        shares = (1 + math.tanh(score / 2)) / 2, (1 - math.tanh(score / 2)) / 2
        sole = _sole(shares)
        return _mixed([large, tuned], shares) if sole is None else logits[sole]


def features(large: Floats, tuned: Floats) -> Floats:
    """What `LearnedMixture` weighs, as `[len(FEATURES)]`, of two rows of logits `[vocab]`."""
    return _features(_Normal(large), _Normal(tuned))


def _features(large: _Normal, tuned: _Normal) -> Floats:
    first, second = large.best, tuned.best
    logs = [-large.log_total, -tuned.log_total, large.logprob(second), tuned.logprob(first)]
    best_large, best_tuned, large_there, tuned_there = (max(one, _LEAST_LOG) for one in logs)
    agree = float(first == second)
    values = (1, large.entropy, tuned.entropy, best_large, best_tuned, agree, large_there, tuned_there)
    return np.array(values, np.float32)


def _mixed(rows: Sequence[_Normal], weights: Sequence[float]) -> Floats:
    """`log sum_i w_i p_i`, `[vocab]`. It uses up what the rows have `raised`: fresh memory costs more than the arithmetic."""
    taken = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
    for row, weight in taken:
        row.raised *= np.float32(weight / row.total)
    mean = taken[0][0].raised
    for row, _ in taken[1:]:
        mean += row.raised
    faint = np.flatnonzero(mean < _FAINT) if mean.min() < _FAINT else None
    np.log(np.maximum(mean, np.float32(_FAINT), out=mean), out=mean)
    if faint is not None:
        mean[faint] = _log_mixed(taken, faint)
    return mean


def _log_mixed(rows: Sequence[tuple[_Normal, float]], tokens: npt.NDArray[np.intp]) -> Doubles:
    """The same for some tokens by log-sum-exp over the rows, so that no probability is too small for it."""
    terms = np.stack([row.logprobs(tokens) + math.log(weight) for row, weight in rows])
    # A token that no row allows is -inf in all of them, and -inf less itself would not be a number.
    most = terms.max(axis=0).clip(np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        combined: Doubles = np.log(np.exp(terms - most).sum(axis=0)) + most
    return combined


def _sole(weights: Sequence[float]) -> int | None:
    """The row that has all the weight."""
    held = [row for row, weight in enumerate(weights) if weight > 0]
    return held[0] if len(held) == 1 else None


def _check_weights(weights: Sequence[float]) -> None:
    if not (all(weight >= 0 for weight in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise InvalidRequest(f"The weights are {tuple(weights)}.", hint="Give weights from 0 that sum to 1.")
