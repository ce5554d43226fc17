"""Fit how a small expert changes what a large model says, on answers that neither was trained on.

One pass over the answers records what every method needs of each token; what is tried then is arithmetic on a few numbers. What
is made small is the mean over the answers of their negative log-likelihood a token, as `evaluate` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from ..experts.engine.batch import Floats
from ..experts.engine.combine import log_sum_exp
from ..experts.engine.engine import Engine
from ..experts.engine.mixing import FEATURES, features
from ..experts.engine.request import Request
from ..experts.engine.steering import Strength
from ..experts.engine.tail import WithTail
from ..schema import Combination
from .answerer import Question, Rows, run_all

STEP = 0.1
ALPHAS = np.arange(21) * STEP
"""The strengths that `proxy` is recorded at; what lies between is read off a straight line."""
STEERED = (0, 5, 10)
"""Of `ALPHAS`, those that the large model is tried to be steered with before `comblm` mixes it with the small expert."""
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

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded of T tokens of answers: log-probabilities of the token that came."""

    weights: Doubles
    """[T] the token's part in the loss: those of one answer are alike, and each answer's sum is one over their number."""
    steps: npt.NDArray[np.int64]
    """[T] tokens of the answer before it."""
    large: Doubles
    """[T], and so `tuned` and `untuned`: by each model alone."""
    tuned: Doubles
    untuned: Doubles
    proxy: Doubles
    """[T, len(ALPHAS)] by `proxy` at each strength."""
    features: Doubles
    """[T, len(STEERED), len(FEATURES)] what CombLM weighs of the small expert and a large model that is steered so."""

    def nll(self, logprobs: Doubles) -> float:
        """The loss, of log-probabilities `[T]` or of those of several `[T, n]`, whose least is meant."""
        return float(-(self.weights @ logprobs).max())

    def steered(self, strength: Strength) -> Doubles:
        """[T] by `proxy`, with a strength that may fade."""
        alphas = np.array([strength.at(step) for step in range(int(self.steps.max()) + 1)])
        return _between(self.proxy, alphas[self.steps])


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
        """As JSON-ready values; `from_dict` reads it back."""
        return asdict(self)


def fitted_from_dict(data: Mapping[str, Any]) -> Fitted:
    """Read what `Fitted.to_dict` wrote."""
    combinations = {
        method: Combination(**{**body, "weights": tuple(body["weights"])})
        for method, body in data["combinations"].items()
    }
    return Fitted(**{**data, "combinations": combinations})


class Recorder:
    """In place of a combiner, for one given answer: records what `Recorded` has. Rows: large, tuned, untuned."""

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer = answer
        self.tokens: list[tuple[Doubles, Doubles, Doubles]] = []
        """Of each token: by the three models, by `proxy`, CombLM's features."""

    @property
    def rows(self) -> int:
        """Three."""
        return 3

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int]) -> Floats:
        """The large model's row, as it is."""
        token = self._answer[len(generated)]
        alone = np.array([row[token] - log_sum_exp(row) for row in logits], np.float64)
        weighed = [features(row, logits[1]) for row in _steered(logits, [ALPHAS[place] for place in STEERED])]
        self.tokens.append((alone, _at_alphas(logits, token), np.stack(weighed).astype(np.float64)))
        return logits[0]


def record(
    engine: Engine,
    rows: Callable[[Sequence[int]], Rows],
    questions: Sequence[Question],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Recorded:
    """Have the engine read the one answer of each question. `rows` are those of large, tuned and untuned, for a prompt.

    The large row may hold its likeliest tokens alone: it is completed as it is when it serves. Raises InvalidRequest where there
    are no questions, and what the engine raises.
    """
    if not questions:
        raise InvalidRequest("There are no answers to fit a combination on.", hint="Give more examples.")
    recorders = [Recorder(answers[0]) for _, answers in questions]
    requests = (
        Request(rows(prompt), WithTail(recorder, known=0, prior=2), forced=tuple(answers[0]))
        for (prompt, answers), recorder in zip(questions, recorders, strict=True)
    )
    for done, _ in enumerate(run_all(engine, requests), 1):
        progress(done, len(questions))
    return gather(recorders)


def gather(recorders: Sequence[Recorder]) -> Recorded:
    """What was recorded of several answers as one."""
    lengths = [len(one.tokens) for one in recorders]
    tokens = [token for one in recorders for token in one.tokens]
    alone = np.stack([one for one, _, _ in tokens])
    return Recorded(
        weights=np.repeat([1 / (length * len(lengths)) for length in lengths], lengths),
        steps=np.concatenate([np.arange(length) for length in lengths]),
        large=alone[:, 0],
        tuned=alone[:, 1],
        untuned=alone[:, 2],
        proxy=np.stack([one for _, one, _ in tokens]),
        features=np.stack([one for _, _, one in tokens]),
    )


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


def _steered(logits: Sequence[Floats], alphas: Iterable[float]) -> Iterator[Floats]:
    """What `proxy` makes of the rows at each strength, in one place: the next one overwrites it."""
    large, tuned, untuned = logits
    change, steered = tuned - untuned, np.empty_like(large)
    for alpha in alphas:
        np.multiply(change, np.float32(alpha), out=steered)
        steered += large
        yield steered


def _at_alphas(logits: Sequence[Floats], token: int) -> Doubles:
    """[len(ALPHAS)] the token's log-probability by `proxy`: 1.5 ms with 49,152 tokens."""
    return np.array([row[token] - log_sum_exp(row) for row in _steered(logits, ALPHAS)], np.float64)


def _between(table: Doubles, alphas: Doubles) -> Doubles:
    """[T] each row of `table` [T, len(ALPHAS)] at its alpha."""
    places = np.minimum(alphas / STEP, len(ALPHAS) - 1)
    left = np.minimum(places.astype(np.intp), len(ALPHAS) - 2)
    part, at = places - left, np.arange(len(table))
    between: Doubles = (1 - part) * table[at, left] + part * table[at, left + 1]
    return between
