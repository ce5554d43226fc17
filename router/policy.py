"""From probabilities to a decision. A policy is handed numbers and names; it reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..schema import Decision, Reason
from .head import Floats


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


def top1(scores: Scores, experts: Mapping[str, str], fallback: str) -> Decision:
    """The likeliest domain's expert; `experts` names the live one of each domain that has one.

    Where no domain fits, or the one that does has no expert, `fallback` answers and the reason says which it was.
    """
    if not scores.known:
        return _decide(scores, None, fallback, "unknown_domain")
    if scores.domain not in experts:
        return _decide(scores, scores.domain, fallback, "no_expert")
    return _decide(scores, scores.domain, experts[scores.domain], "routed")


def explicit(scores: Scores, expert: str) -> Decision:
    """The expert that was asked for by name, whatever the router thinks."""
    return _decide(scores, scores.domain if scores.known else None, expert, "explicit")


def degraded(decision: Decision, fallback: str) -> Decision:
    """The same decision, answered by the fallback because the chosen expert cannot serve."""
    return replace(decision, candidates=((fallback, 1.0),), reason="degraded")


def _decide(scores: Scores, domain: str | None, expert: str, reason: Reason) -> Decision:
    return Decision(
        domain=domain,
        candidates=((expert, 1.0),),
        probabilities=scores.probabilities,
        prediction_set=scores.prediction_set,
        confidence=scores.confidence,
        reason=reason,
        threshold=scores.threshold,
        router_version=scores.router_version,
    )
