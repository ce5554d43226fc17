"""A large model steered by the logits of small ones: proxy-tuning and contrastive decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np

from ...errors import InvalidRequest
from .batch import Floats
from .combine import Combiner, check_rows


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly to steer at each token of an answer: from `start`, in a straight line, to `end` after `fade` tokens.

    Raises InvalidRequest where a value is negative or not finite, or one of `end` and `fade` comes without the other.
    """

    start: float
    end: float | None = None
    fade: int = 0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.start), ("alpha_end", self.end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(
                    f"{name} is {value}.", hint="Give a number from 0 (the large model alone) upwards."
                )
        if self.fade < 0 or (self.end is None) != (self.fade == 0):
            raise InvalidRequest(
                f"alpha_end is {self.end}, fade is {self.fade}.",
                hint="Give both, fade a number of tokens from 1, or neither.",
            )

    def at(self, step: int) -> float:
        """Its value where the answer has `step` tokens."""
        if self.end is None:
            return self.start
        passed = min(step / self.fade, 1.0)
        return (1 - passed) * self.start + passed * self.end


@dataclass(frozen=True, slots=True)
class LogitArithmetic:
    """A large model steered by what tuning changed in a small one. Rows: large, tuned, untuned.

    `z = large + alpha_t (tuned - untuned)`: proxy-tuning (Liu et al. 2024, "Tuning Language Models by Proxy"), after DExperts
    (Liu et al. 2021, "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts"). `alpha_t` is the
    strength where the answer has t tokens; a plain number is a constant one.
    """

    alpha: InitVar[Strength | float]
    strength: Strength = field(init=False)

    def __post_init__(self, alpha: Strength | float) -> None:
        object.__setattr__(self, "strength", _strength(alpha))

    @property
    def rows(self) -> int:
        """Three."""
        return 3

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z` of the class; the large row itself where alpha is 0.

        Worked out in double precision, so that nothing is rounded away: alpha 1 with equal large and untuned rows gives the
        tuned one, equal tuned and untuned rows give the large one. A token that the large or the tuned row forbids (-inf) is
        forbidden. Of one that only the untuned row forbids it is not known what tuning changed: it stays as it was.
        """
        check_rows(self, logits)
        large, tuned, untuned = logits
        alpha = self.strength.at(len(generated))
        return large if alpha == 0 else _steered(large, alpha, tuned, untuned)


@dataclass(frozen=True, slots=True)
class Steered:
    """A combiner of a large and a tuned row whose large row is steered first. Rows: large, tuned, untuned."""

    combiner: Combiner
    steering: LogitArithmetic

    @property
    def rows(self) -> int:
        """Three."""
        return 3

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """What the combiner makes of `LogitArithmetic`'s row and the tuned one."""
        return self.combiner([self.steering(logits, generated), logits[1]], generated)


@dataclass(frozen=True, slots=True)
class Contrast:
    """What a large model says more than a small one, among what it finds plausible. Rows: large, untuned.

    `z = (1 + beta_t) large - beta_t untuned` for tokens at least `plausibility` times as probable to the large model as its
    likeliest, -inf for others: contrastive decoding (Li et al. 2023, "Contrastive Decoding: Open-ended Text Generation as
    Optimization") in the form of O'Brien & Lewis 2023, "Contrastive Decoding Improves Reasoning in Large Language Models".
    Raises InvalidRequest where `plausibility` is not above 0 and at most 1.
    """

    beta: InitVar[Strength | float]
    plausibility: float = 0.1
    strength: Strength = field(init=False)

    def __post_init__(self, beta: Strength | float) -> None:
        if not 0 < self.plausibility <= 1:
            raise InvalidRequest(f"plausibility is {self.plausibility}.", hint="Give a number above 0 and at most 1.")
        object.__setattr__(self, "strength", _strength(beta))

    @property
    def rows(self) -> int:
        """Two."""
        return 2

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
        """`z` of the class; the large row itself where beta is 0. What only the untuned row forbids is not contrasted."""
        check_rows(self, logits)
        large, untuned = logits
        beta = self.strength.at(len(generated))
        if beta == 0:
            return large
        plausible = np.flatnonzero(large >= large.max() + math.log(self.plausibility))
        kept = large[plausible]
        contrasted: Floats = np.full_like(large, -np.inf)
        contrasted[plausible] = _steered(kept, beta, kept, untuned[plausible])
        return contrasted


def _steered(large: Floats, alpha: float, tuned: Floats, untuned: Floats) -> Floats:
    """`large + alpha (tuned - untuned)`; a difference from what is -inf in `untuned` is none."""
    with np.errstate(invalid="ignore"):  # -inf less -inf, which the next lines put right
        change = np.subtract(tuned, untuned, dtype=np.float64)
    if untuned.min() == -np.inf:
        change[untuned == -np.inf] = 0
        change[tuned == -np.inf] = -np.inf
    change *= alpha
    change += large
    return change.astype(np.float32)


def _strength(value: Strength | float) -> Strength:
    return value if isinstance(value, Strength) else Strength(value)
