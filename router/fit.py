"""Fit a head on embeddings, calibrate it, and set the threshold below which a prompt fits no domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .head import Floats, Head

INVERSE_REGULARISATION = 1.0
"""sklearn's C. `python benchmarks/router.py --sweep` gives smaller values up to a point more on the dev sources, but they leave
short free questions ("What is a tort?") at or below the open-set threshold."""
SOURCE_WEIGHTS = {"questions": 3.0}
"""Free questions count more than a data set of their domain: they are what people send."""


def fit_head(embeddings: Floats, domains: Sequence[str], sources: Sequence[str]) -> Head:
    """Multinomial logistic regression on [n, dimension] embeddings.

    Every domain weighs the same, and within it every source, so that no large data set speaks for its whole domain.
    """
    from sklearn.linear_model import LogisticRegression

    labels, origins = np.asarray(domains), np.asarray(sources)
    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
    model.fit(embeddings, labels, sample_weight=_balance(labels, origins))
    weights, bias = model.coef_, model.intercept_
    if len(weights) < len(model.classes_):  # sklearn keeps one row for two classes
        weights, bias = np.vstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return Head(tuple(str(domain) for domain in model.classes_), weights.astype(np.float32), bias.astype(np.float32))


def calibrate(
    head: Head, embeddings: Floats, domains: Sequence[str], sources: Sequence[str], false_rejects: float
) -> Head:
    """Set temperature and threshold on held-out rows of known domains.

    The temperature minimises the negative log-likelihood; the threshold refuses the share `false_rejects` of these rows.
    Every source weighs the same.
    """
    from scipy.optimize import minimize_scalar

    labels = np.asarray([head.domains.index(domain) for domain in domains])
    weights = _balance(np.asarray(domains), np.asarray(sources))
    weights /= weights.sum()

    def loss(log_temperature: float) -> float:
        chosen = replace(head, temperature=float(np.exp(log_temperature))).probabilities(embeddings)
        return float(-(weights * np.log(chosen[np.arange(len(labels)), labels] + 1e-12)).sum())

    best = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x
    calibrated = replace(head, temperature=float(np.exp(best)))
    confidence = calibrated.probabilities(embeddings).max(axis=1)
    order = np.argsort(confidence)
    refused = np.cumsum(weights[order])
    threshold = confidence[order][int(np.searchsorted(refused, false_rejects))]
    return replace(calibrated, threshold=float(threshold))


def _balance(domains: NDArray[np.str_], sources: NDArray[np.str_]) -> NDArray[np.float64]:
    """Weights with mean 1 that give every domain the same sum, and every source its share of its domain."""
    weights = np.empty(len(domains))
    for domain in (names := np.unique(domains)):
        inside = domains == domain
        shares = {source: SOURCE_WEIGHTS.get(str(source), 1.0) for source in np.unique(sources[inside])}
        for source, share in shares.items():
            rows = inside & (sources == source)
            weights[rows] = len(domains) / len(names) * share / sum(shares.values()) / rows.sum()
    return weights
