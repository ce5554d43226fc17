"""Fit a head on stored embeddings, add a class to one, and calibrate it on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .head import Floats, Head
from .neighbours import Votes, vote
from .openset import OpenSet
from .rows import BACKGROUND, Rows

INVERSE_REGULARISATION = 1.0
"""sklearn's C."""


def fit_head(rows: Rows) -> Head:
    """Multinomial logistic regression on the balanced rows.

    Rows of the background are a class of their own beside the domains, which the head then leaves out: prompts near it get small
    logits everywhere.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
    model.fit(rows.embeddings, np.asarray(rows.domains), sample_weight=rows.weights)
    weights, bias = model.coef_, model.intercept_
    if len(weights) < len(model.classes_):  # sklearn keeps one row for two classes
        weights, bias = np.vstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    known = [index for index, domain in enumerate(model.classes_) if domain != BACKGROUND]
    domains = tuple(str(model.classes_[index]) for index in known)
    return Head(domains, weights[known].astype(np.float32), bias[known].astype(np.float32))


def add_class(head: Head, rows: Rows, name: str) -> Head:
    """The head with one more domain, whose prompts are among `rows`; what it knew stays as it was, weight for weight.

    Only the new weights w and bias b are fitted: they minimise the balanced negative log-likelihood of all rows under
    softmax([fixed logits, x w + b]) + |w|^2 / (2 C n), as `fit_head` does with all of them.
    """
    from scipy.optimize import minimize

    known = rows.where(lambda domain: domain != BACKGROUND)
    embeddings = known.embeddings.astype(np.float64)
    fixed = np.logaddexp.reduce(head.logits(known.embeddings).astype(np.float64), axis=1)
    mine = np.asarray([domain == name for domain in known.domains])
    weights = known.weights / len(known)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        margin = embeddings @ parameters[:-1] + parameters[-1] - fixed
        # log-likelihood of "the new one against all others": their shares among each other do not depend on it
        value = weights @ (np.logaddexp(0, margin) - mine * margin)
        slope = weights * (1 / (1 + np.exp(-margin)) - mine)
        penalty = 1 / (INVERSE_REGULARISATION * len(known))
        gradient = np.append(embeddings.T @ slope + penalty * parameters[:-1], slope.sum())
        return float(value + penalty / 2 * parameters[:-1] @ parameters[:-1]), gradient

    found = minimize(loss, np.zeros(embeddings.shape[1] + 1), jac=True, method="L-BFGS-B").x.astype(np.float32)
    order = sorted(range(len(head.domains) + 1), key=lambda index: (*head.domains, name)[index])
    return replace(
        head,
        domains=tuple((*head.domains, name)[index] for index in order),
        weights=np.vstack([head.weights, found[:-1]])[order],
        bias=np.append(head.bias, found[-1])[order],
    )


def drop_class(head: Head, name: str) -> Head:
    """The head without a domain; the others stay as they were."""
    keep = [index for index, domain in enumerate(head.domains) if domain != name]
    return replace(
        head,
        domains=tuple(head.domains[index] for index in keep),
        weights=head.weights[keep],
        bias=head.bias[keep],
    )


def calibrate(head: Head, stored: Rows, held_out: Rows) -> tuple[Head, OpenSet]:
    """Temperature, prediction sets and familiarity, on held-out prompts of known domains; every source weighs the same.

    The temperature minimises the negative log-likelihood. `least` is the conformal quantile of the right domain's probability.
    """
    from scipy.optimize import minimize_scalar

    labels = held_out.places(head.domains)
    weights = held_out.weights / len(held_out)
    embeddings, every = held_out.embeddings, np.arange(len(labels))
    votes = vote(stored, embeddings, head.domains)

    def right(log_temperature: float) -> Floats:
        warmer = replace(head, temperature=float(np.exp(log_temperature)))
        found: Floats = warmer.probabilities(embeddings, votes.shares)[every, labels]
        return found

    best = minimize_scalar(lambda at: -(weights * np.log(right(at))).sum(), bounds=(-3.0, 3.0), method="bounded").x
    chances = right(best)
    order = np.argsort(chances)
    allowed = 1 - head.coverage * (1 + 1 / len(labels))  # the finite-sample correction of conformal prediction
    least = float(chances[order][int(np.searchsorted(np.cumsum(weights[order]), max(0.0, allowed)))])
    calibrated = replace(head, temperature=float(np.exp(best)), least=least)
    return calibrated, OpenSet.fit(views(calibrated, votes, embeddings), held_out.weights)


def views(head: Head, votes: Votes, embeddings: Floats) -> Floats:
    """[n, 3]: the views of how familiar prompts are (see openset.py)."""
    return np.stack([head.logits(embeddings).max(axis=1), votes.nearest, votes.agreement], axis=1)


def right_by_source(guesses: Sequence[str], rows: Rows) -> dict[str, float]:
    """Share of each source's rows whose guess is their domain, and `mean` over the sources."""
    right: dict[str, list[bool]] = {}
    for guess, domain, source in zip(guesses, rows.domains, rows.sources, strict=True):
        right.setdefault(f"{domain}/{source}", []).append(guess == domain)
    accuracy = {source: round(float(np.mean(hits)), 4) for source, hits in sorted(right.items())}
    return {**accuracy, "mean": round(float(np.mean(list(accuracy.values()))), 4)}
