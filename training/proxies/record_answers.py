"""What is recorded of given answers, from which combinations are fitted.

One pass over the answers records what every method needs of each token; what is tried then is arithmetic on a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InvalidRequest
from ...experts.engine.batch import Floats
from ...experts.engine.combine import log_sum_exp
from ...experts.engine.engine import Engine
from ...experts.engine.mixing import features
from ...experts.engine.request import Request
from ...experts.engine.steering import Strength
from ...experts.engine.tail import WithTail
from ..measuring.answerer import Question, Rows, run_all

STEP = 0.1
ALPHAS = np.arange(21) * STEP
"""The strengths that `proxy` is recorded at; what lies between is read off a straight line."""
STEERED = (0, 5, 10)
"""Of `ALPHAS`, those that the large model is tried to be steered with before `comblm` mixes it with the small expert."""

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
