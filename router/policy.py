"""From what the router measured to a decision about who answers.

A policy is a function. It is handed numbers and names and reads nothing else, so it is tested without a model. A plug-in adds one
through the entry point `collegium.policies`; docs/extending.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..plugins import find
from ..schema import Decision, Reason
from .head import Floats

BUILT_IN = {name: f"router.policies.{name}:{name}" for name in ("frugal", "mixture", "top1")}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What the router measured on one prompt.

    `embedding` is [dimension]; the probabilities are calibrated; `confidence` is compared with `threshold`.
    """

    embedding: Floats

    probabilities: Mapping[str, float]
    prediction_set: tuple[str, ...]
    confidence: float
    threshold: float
    router_version: str

    @property
    def domain(self) -> str:
        """The likeliest domain."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def known(self) -> bool:
        """Whether any domain fits."""
        return self.confidence >= self.threshold

    def decide(self, domain: str | None, candidates: tuple[tuple[str, float], ...], reason: Reason) -> Decision:
        """A decision that rests on these scores; `candidates` are (expert, weight), best first, weights summing to 1."""
        return Decision(
            domain=domain,
            candidates=candidates,
            probabilities=self.probabilities,
            prediction_set=self.prediction_set,
            confidence=self.confidence,
            reason=reason,
            threshold=self.threshold,
            router_version=self.router_version,
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """Somebody who can answer for a domain.

    `score` is the mean of what was measured on the domain's held-out rows, 0 to 1, and None where nothing was; `cost` is what a
    token costs beside one of the base model, which is 1.
    """

    expert: str
    score: float | None
    cost: float


@dataclass(frozen=True, slots=True)
class Live:
    """What a policy may choose from: the live expert of each domain that has one, and who answers where none does.

    `baseline` is what the fallback scored on the rows that the domain's expert was measured on; the fallback's own `score` is
    None, because it differs from domain to domain.
    """

    offers: Mapping[str, Offer]
    fallback: Offer
    baseline: Mapping[str, float]


Policy = Callable[[Scores, Live], Decision]


def policy(name: str) -> Policy:
    """The policy of this name. Raises InvalidRequest that lists the known ones."""
    found: Policy = find("collegium.policies", name, BUILT_IN, f"There is no policy {name!r}.")
    return found


def degraded(decision: Decision, fallback: str) -> Decision:
    """The same decision, answered by the fallback because the chosen expert cannot serve."""
    return replace(decision, candidates=((fallback, 1.0),), reason="degraded")
