"""From the combination on a card to rows and their combiner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidRequest
from ..schema import Combination
from .engine.combine import Combiner
from .engine.mixing import LearnedMixture, ProbabilityMixture
from .engine.steering import Contrast, LogitArithmetic, Steered, Strength
from .engine.tail import WithTail

Part = Literal["large", "tuned", "untuned"]
"""Who a row is: the large model, the small one with its adapter, the small one as it is."""


@dataclass(frozen=True, slots=True)
class Formula:
    """What rows are needed, in this order, and what makes one distribution of them."""

    parts: tuple[Part, ...]
    combiner: Combiner


def formula(combination: Combination, alpha: float | None = None) -> Formula:
    """The formula of a card, for one answer, with another constant `alpha` for it.

    Raises InvalidRequest where a value is out of range, or `alpha` has no meaning for the method.
    """
    strength = Strength(combination.alpha, combination.alpha_end, combination.fade)
    if alpha is not None:
        strength = Strength(alpha)
    match combination.method:
        case "proxy":
            return Formula(("large", "tuned", "untuned"), LogitArithmetic(strength))
        case "contrastive":
            return Formula(("large", "untuned"), Contrast(strength))
        case "mixture":
            return Formula(("large", "tuned"), ProbabilityMixture(_shares(strength)))
        case "comblm":
            if alpha is not None:
                raise InvalidRequest(
                    "This expert's combination is learned and takes no alpha.", hint="Leave alpha out."
                )
            learned = LearnedMixture(combination.weights)
            if strength == Strength(0):
                return Formula(("large", "tuned"), learned)
            return Formula(("large", "tuned", "untuned"), Steered(learned, LogitArithmetic(strength)))
        case _:  # a card comes from outside
            raise InvalidRequest(
                f"No combination is called {combination.method!r}.", hint="Take proxy, contrastive, mixture or comblm."
            )


def with_tail(known: Formula) -> Formula:
    """The formula for a large row that holds only its likeliest tokens: `WithTail`, with `untuned` to guess the others."""
    parts = known.parts if "untuned" in known.parts else (*known.parts, "untuned")
    return Formula(parts, WithTail(known.combiner, parts.index("large"), parts.index("untuned")))


def _shares(strength: Strength) -> tuple[float, float]:
    """The large model's and the small expert's."""
    share = strength.start
    if strength.end is not None:
        raise InvalidRequest("A mixture's alpha does not fade.", hint="Leave alpha_end and fade out.")
    if share > 1:
        raise InvalidRequest(f"alpha is {share}.", hint="The small expert's share is a number from 0 to 1.")
    return 1 - share, share
