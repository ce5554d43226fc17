"""The likeliest domain's expert."""

from __future__ import annotations

from ...schema import Decision
from ..policy import Live, Scores


def top1(scores: Scores, live: Live) -> Decision:
    """The likeliest domain's expert, alone.

    Where no domain fits, or the one that does has no expert, the fallback answers and the reason says which it was.
    """
    fallback = ((live.fallback.expert, 1.0),)
    if not scores.known:
        return scores.decide(None, fallback, "unknown_domain")
    offer = live.offers.get(scores.domain)
    if offer is None:
        return scores.decide(scores.domain, fallback, "no_expert")
    return scores.decide(scores.domain, ((offer.expert, 1.0),), "routed")
