"""The domain's expert where it is worth its cost."""

from __future__ import annotations

from dataclasses import replace

from ...schema import Decision
from ..policy import Live, Scores
from .top1 import top1

MARGIN = 0.02
"""Score that one more unit of cost, a base model's token, must buy; 95 % intervals on a few hundred rows are wider than this."""


def frugal(scores: Scores, live: Live) -> Decision:
    """Of the domain's expert and the fallback, whoever has more expected score left after paying for it.

    `max of E[score] - MARGIN * cost`, with `E[score of the expert] = p score + (1 - p) baseline`, p the domain's probability:
    outside its domain an expert is taken to be as good as the fallback. A price on cost is how RouterBench weighs routers (Hu et
    al. 2024, "RouterBench: A Benchmark for Multi-LLM Routing System"). Where nothing was measured it is `top1`.
    """
    decision = top1(scores, live)
    offer, baseline = live.offers.get(scores.domain), live.baseline.get(scores.domain)
    if decision.reason != "routed" or offer is None or offer.score is None or baseline is None:
        return decision
    gain = scores.probabilities[scores.domain] * (offer.score - baseline)
    if gain > MARGIN * (offer.cost - live.fallback.cost):
        return decision
    return replace(decision, candidates=((live.fallback.expert, 1.0),), reason="cheaper")
