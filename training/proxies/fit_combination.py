"""Fit how a small expert changes what a large model says, on answers that neither was trained on.

What is tried is arithmetic on what was recorded of each token. What is made small is the mean over the answers of their negative
log-likelihood a token, as `evaluate` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...experts.engine.mixing import FEATURES
from ...experts.engine.steering import Strength
from ...schema import Combination
from .record_answers import ALPHAS, STEERED, Doubles, Recorded

SHARES = np.arange(21) / 20
"""The small expert's shares that `mixture` is tried with."""
FADES = (4, 16, 64)
"""Tokens over which alpha is tried to fade, between every second of `ALPHAS`."""
WORTH = 0.01
"""Part of the loss that a fading alpha must save to be chosen, and so CombLM: they have more numbers to be wrong about."""
RIDGE = 1e-3
"""Weight of CombLM's squared weights in its loss, the bias left out."""
BETA = 0.5
"""Of `contrastive`, as its paper has it: it forbids what is not plausible, so a likelihood has nothing to say about it."""
METHODS = ("best", "proxy", "mixture", "comblm", "contrastive")
"""What can be asked for: `best` is the likeliest of those that are fitted."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The best combination of each method, and the loss in nats a token: of the methods, and of each model alone."""

    combinations: Mapping[str, Combination]
    nll: Mapping[str, float]
    answers: int
    tokens: int

    def choose(self, method: str) -> Combination:
        """The combination of a method; of `best`, the one with the least loss, CombLM where that is `WORTH` it."""
        if method == "contrastive":
            return Combination("contrastive", BETA)
        if method == "best":
            method = min(self.combinations, key=lambda one: self.nll[one] / (1 - WORTH * (one == "comblm")))
        return self.combinations[method]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `fitted_from_dict` reads it back."""
        return asdict(self)


def fitted_from_dict(data: Mapping[str, Any]) -> Fitted:
    """Read what `Fitted.to_dict` wrote."""
    combinations = {
        method: Combination(**{**body, "weights": tuple(body["weights"])})
        for method, body in data["combinations"].items()
    }
    return Fitted(**{**data, "combinations": combinations})


def fit(recorded: Recorded) -> Fitted:
    """The best of each method."""
    found = {"proxy": _fit_proxy(recorded), "mixture": _fit_mixture(recorded), "comblm": _fit_comblm(recorded)}
    alone = {"large": recorded.large, "tuned": recorded.tuned, "untuned": recorded.untuned}
    nll = {name: loss for name, (_, loss) in found.items()}
    nll |= {name: recorded.nll(logprobs) for name, logprobs in alone.items()}
    return Fitted(
        combinations={name: combination for name, (combination, _) in found.items()},
        nll={name: round(loss, 4) for name, loss in nll.items()},
        answers=int((recorded.steps == 0).sum()),
        tokens=len(recorded.steps),
    )


def _fit_proxy(recorded: Recorded) -> tuple[Combination, float]:
    """The loss is convex in a constant alpha, so the best of the grid is next to the best of all."""
    constant = recorded.weights @ recorded.proxy
    best, loss = float(ALPHAS[constant.argmax()]), float(-constant.max())
    ends = [float(alpha) for alpha in ALPHAS[::2]]
    fading = [
        Strength(start, end, fade)
        for fade in FADES
        if fade < recorded.steps.max()
        for start in ends
        for end in ends
        if start != end
    ]
    losses = [recorded.nll(recorded.steered(strength)) for strength in fading]
    if losses and min(losses) < (1 - WORTH) * loss:
        chosen, loss = fading[int(np.argmin(losses))], min(losses)
        return Combination("proxy", round(chosen.start, 1), round(chosen.end or 0.0, 1), chosen.fade), loss
    return Combination("proxy", round(best, 1)), loss


def _fit_mixture(recorded: Recorded) -> tuple[Combination, float]:
    share, loss = _best_share(recorded, recorded.large)
    return Combination("mixture", share), loss


def _best_share(recorded: Recorded, large: Doubles) -> tuple[float, float]:
    """The small expert's share beside such a large model, and the loss."""
    with np.errstate(divide="ignore"):  # a share of 0 is a weight of -inf
        mixed = np.logaddexp(np.log(1 - SHARES) + large[:, None], np.log(SHARES) + recorded.tuned[:, None])
    gains = recorded.weights @ mixed
    return float(SHARES[gains.argmax()]), float(-gains.max())


def _fit_comblm(recorded: Recorded) -> tuple[Combination, float]:
    """The best of those with a large model that is steered more or less."""
    tried = [_fit_weights(recorded, place) for place in range(len(STEERED))]
    return min(tried, key=lambda one: one[1])


def _fit_weights(recorded: Recorded, place: int) -> tuple[Combination, float]:
    """Maximum likelihood by L-BFGS, from the best constant share on."""
    from scipy.optimize import minimize

    large, features = recorded.proxy[:, STEERED[place]], recorded.features[:, place]
    share = float(np.clip(1 - _best_share(recorded, large)[0], 0.01, 0.99))
    start = np.zeros(len(FEATURES))
    start[0] = np.log(share / (1 - share))
    spread = np.where(features.std(0) > 0, features.std(0), 1.0)
    spread[0] = 1.0
    scaled = features / spread  # of one size, so that the ridge weighs them alike
    ridge = np.full(len(FEATURES), RIDGE)
    ridge[0] = 0.0

    def loss(weights: Doubles) -> tuple[float, Doubles]:
        mixed, gradient = _mixed(large, recorded.tuned, scaled @ weights)
        total = -float(recorded.weights @ mixed) + float(ridge @ weights**2)
        return total, -(scaled.T @ (recorded.weights * gradient)) + 2 * ridge * weights

    found = minimize(loss, start, jac=True, method="L-BFGS-B").x / spread
    weights = tuple(round(float(weight), 5) for weight in found)
    alpha = round(float(ALPHAS[STEERED[place]]), 1)
    return Combination("comblm", alpha, weights=weights), recorded.nll(
        _mixed(large, recorded.tuned, features @ weights)[0]
    )


def _mixed(large: Doubles, tuned: Doubles, scores: Doubles) -> tuple[Doubles, Doubles]:
    """[T] `log(l p_large + (1 - l) p_tuned)` with `l = sigmoid(score)`, and its derivative: posterior of large less `l`."""
    weighed = large - np.logaddexp(0, -scores)
    mixed = np.logaddexp(weighed, tuned - np.logaddexp(0, scores))
    return mixed, np.exp(weighed - mixed) - np.exp(-np.logaddexp(0, -scores))
