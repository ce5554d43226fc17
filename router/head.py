"""The head: embeddings to calibrated probabilities over domains. Immutable, a few kilobytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
VOTE = 0.5
"""The neighbours' part of the probability."""
NEVER = 1e-3
"""Added to every probability: neighbours that all agree are no proof."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Softmax regression on embeddings, interpolated with what stored neighbours are of.

    q = 1/2 softmax(x W^T + b) + 1/2 votes, as kNN-LM has it (Khandelwal et al., *Generalization through Memorization*, 2020):
    the line generalises, the neighbours know the corners. p = softmax(log q / T) is calibrated by the temperature T (Guo et
    al., *On Calibration of Modern Neural Networks*, 2017). `weights` are [domains, dimension], `bias` [domains], float32.

    A domain is in a prompt's prediction set where its probability is at least `least`, which split-conformal calibration
    chose so that the set holds the right domain for a share `coverage` of prompts (Sadinle et al., *Least Ambiguous Set-Valued
    Classifiers with Bounded Error Levels*, 2019).
    """

    domains: tuple[str, ...]
    weights: Floats
    bias: Floats
    temperature: float = 1.0
    coverage: float = 0.95
    least: float = 0.05

    def logits(self, embeddings: Floats) -> Floats:
        """Of the regression: [n, dimension] to [n, domains]."""
        return embeddings @ self.weights.T + self.bias

    def probabilities(self, embeddings: Floats, votes: Floats) -> Floats:
        """[n, dimension] and the neighbours' shares [n, domains] to [n, domains]; rows sum to 1."""
        blended: Floats = (1 - VOTE) * softmax(self.logits(embeddings)) + VOTE * votes
        return softmax(np.log(blended + NEVER, dtype=np.float32) / np.float32(self.temperature))

    def prediction_set(self, probabilities: Mapping[str, float]) -> tuple[str, ...]:
        """The domains that the prompt may well be of, likeliest first; never empty."""
        first, *others = sorted(probabilities, key=lambda domain: -probabilities[domain])
        return (first, *(domain for domain in others if probabilities[domain] >= self.least))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return {
            "domains": list(self.domains),
            "temperature": self.temperature,
            "coverage": self.coverage,
            "least": self.least,
        }


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out: Floats = raised / raised.sum(axis=-1, keepdims=True)
    return out
