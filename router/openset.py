"""Whether a prompt belongs to any domain that the router knows.

Three views are added up: the largest logit of the head (Vaze et al., *Open-Set Recognition: A Good Closed-Set Classifier Is All
You Need?*, 2022, and close to the energy score of Liu et al., 2020), the cosine of the nearest stored prompt (Sun et al.,
*Out-of-Distribution Detection with Deep Nearest Neighbors*, 2022), and how far the neighbours agree on a domain, where prompts
of no domain vote, too. What is reported is a conformal p-value (Bates et al., *Testing for Outliers with Conformal p-values*,
2023): the share of held-out prompts of known domains that look no more familiar than this one. So a threshold of 0.05 refuses
one in twenty prompts that it should have kept, and that is all that it states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .head import Floats

GRID = np.linspace(0, 1, 201)
"""The quantiles of held-out familiarity that are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenSet:
    """How familiar held-out prompts of known domains are.

    `centre` and `spread` [3] standardise the views; `quantiles` are those of their sum, at the shares of `GRID`.
    """

    centre: Floats
    spread: Floats
    quantiles: Floats

    @classmethod
    def fit(cls, views: Floats, weights: NDArray[np.floating]) -> Self:
        """From the views [n, 3] of held-out prompts of known domains and their weights [n]."""
        share = weights / weights.sum()
        centre = share @ views
        spread = np.sqrt(share @ (views - centre) ** 2) + 1e-6
        total = ((views - centre) / spread).sum(axis=1)
        order = np.argsort(total)
        # Of n + 1 draws any may be the new one, so on average a share k / (n + 1) of new ones lies below the k-th of n.
        reached = np.cumsum(share[order]) * len(views) / (len(views) + 1)
        quantiles = np.interp(GRID, reached, total[order])
        return cls(centre.astype(np.float32), spread.astype(np.float32), quantiles.astype(np.float32))

    def p_values(self, views: Floats) -> Floats:
        """[n, 3] to [n]: the share of held-out prompts that look no more familiar."""
        total = ((views - self.centre) / self.spread).sum(axis=1)
        found: Floats = np.interp(total, self.quantiles, GRID).astype(np.float32)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: [float(value) for value in getattr(self, name)] for name in ("centre", "spread", "quantiles")}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """What `to_dict` gave. Raises LookupError or ValueError where something is missing or no number."""
        return cls(*(np.asarray(body[name], np.float32) for name in ("centre", "spread", "quantiles")))
