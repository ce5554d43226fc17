"""Several experts at once, each as much as its domain is likely."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from ...schema import Decision
from ..policy import Live, Scores
from .top1 import top1

MOST = 3
"""Experts that answer together. Each is a row in the batch, so it adds its whole cost, and a fourth could never weigh more than
a quarter."""
LEAST = 0.1
"""Weight below which an expert is left out: it would cost a whole row and hardly ever change the token."""


def mixture(scores: Scores, live: Live) -> Decision:
    """The experts of the prediction set, weighted by their domains' probabilities.

    `p(token) = sum_d p(d | prompt, answer so far) p_d(token)`, the ensemble of DEMix (Gururangan et al. 2022, "DEMix Layers:
    Disentangling Domains for Modular Language Modeling") over the domains that are still possible; these weights are its prior.
    Where the likeliest domain has no expert the fallback answers, as with `top1`: that of a less likely one is not a second best.
    """
    alone = top1(scores, live)
    if alone.reason != "routed":
        return alone
    possible = {scores.domain, *scores.prediction_set} & live.offers.keys() & scores.probabilities.keys()
    likely = sorted(possible, key=lambda domain: (-scores.probabilities[domain], domain))[:MOST]
    total = sum(scores.probabilities[domain] for domain in likely)
    # Never empty: the likeliest of MOST has a share of 1 / MOST at least.
    heavy = [domain for domain in likely if scores.probabilities[domain] >= LEAST * total]
    total = sum(scores.probabilities[domain] for domain in heavy)
    weights: defaultdict[str, float] = defaultdict(float)  # by expert: one may answer for several domains
    for domain in heavy:
        weights[live.offers[domain].expert] += scores.probabilities[domain] / total
    if len(weights) == 1:
        return alone
    return replace(alone, candidates=tuple(sorted(weights.items(), key=lambda one: (-one[1], one[0]))))
