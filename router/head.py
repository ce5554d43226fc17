"""The head: embeddings to calibrated probabilities over domains. Linear, immutable, a few kilobytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Softmax regression on embeddings: p = softmax((x W^T + b) / T).

    `weights` [domains, dimension] and `bias` [domains] are float32. `temperature` T calibrates (Guo et al., 2017).
    A prompt whose best probability is below `threshold` fits no domain (the maximum softmax probability of Hendrycks and
    Gimpel, 2017); `coverage` is the probability that a prediction set gathers.
    """

    domains: tuple[str, ...]
    weights: Floats
    bias: Floats
    temperature: float = 1.0
    threshold: float = 0.0
    coverage: float = 0.9

    def probabilities(self, embeddings: Floats) -> Floats:
        """[n, dimension] to [n, domains]; rows sum to 1."""
        logits = (embeddings @ self.weights.T + self.bias) / self.temperature
        logits -= logits.max(axis=1, keepdims=True)
        raised = np.exp(logits)
        out: Floats = raised / raised.sum(axis=1, keepdims=True)
        return out

    def prediction_set(self, probabilities: dict[str, float]) -> tuple[str, ...]:
        """The fewest domains, likeliest first, whose probabilities reach `coverage`."""
        chosen, total = [], 0.0
        for domain, probability in sorted(probabilities.items(), key=lambda item: -item[1]):
            chosen.append(domain)
            total += probability
            if total >= self.coverage:
                break
        return tuple(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return {
            "domains": list(self.domains),
            "temperature": self.temperature,
            "threshold": self.threshold,
            "coverage": self.coverage,
        }
