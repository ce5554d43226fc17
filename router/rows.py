"""The stored prompts of a router: their embeddings and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .head import Floats

BACKGROUND = ""
"""The domain of prompts that belong to none: they shape the head, and are never an answer of it."""

OWN_VOICE = 0.25
"""Of a row that a user added, beside those that a router was calibrated with: at full voice a new domain takes more of the
others' accuracy than the half point that it may (`benchmarks/router.py` prints it as `add_domain_cost`)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """`embeddings` [n, dimension], and the domain, source and id of each.

    `texts` are kept only of a user's own domains; None elsewhere.
    """

    embeddings: Floats
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    ids: tuple[str, ...]
    texts: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.domains)

    @cached_property
    def weights(self) -> Floats:
        """[n], with mean 1: every domain the same sum, and within it every source, so that no large one speaks for all."""
        domains, sources = np.asarray(self.domains), np.asarray(self.sources)
        weights = np.empty(len(self), np.float32)
        for domain in (names := np.unique(domains)):
            inside = domains == domain
            for source in (origins := np.unique(sources[inside])):
                rows = inside & (sources == source)
                weights[rows] = len(self) / len(names) / len(origins) / rows.sum()
        return weights

    @cached_property
    def _codes(self) -> tuple[list[str], NDArray[np.int64]]:
        names, codes = np.unique(np.asarray(self.domains), return_inverse=True)
        return names.tolist(), codes

    @cached_property
    def voices(self) -> Floats:
        """[n]: how much each row's vote counts: its weight, and a part of it where the row is a user's own."""
        return self.weights * np.asarray([1 if text is None else OWN_VOICE for text in self.texts], np.float32)

    def places(self, domains: Sequence[str], rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """The place among `domains` of each of these rows' domain, -1 where it is none of them."""
        names, codes = self._codes
        place = np.asarray([domains.index(name) if name in domains else -1 for name in names])
        found: NDArray[np.int64] = place[codes[rows]]
        return found

    def where(self, wanted: Callable[[str], bool]) -> Rows:
        """The rows whose domain is wanted."""
        keep = [index for index, domain in enumerate(self.domains) if wanted(domain)]
        return Rows(
            self.embeddings[keep],
            tuple(self.domains[i] for i in keep),
            tuple(self.sources[i] for i in keep),
            tuple(self.ids[i] for i in keep),
            tuple(self.texts[i] for i in keep),
        )

    def plus(self, other: Rows) -> Rows:
        """These rows and the other's."""
        return Rows(
            np.vstack([self.embeddings, other.embeddings]),
            self.domains + other.domains,
            self.sources + other.sources,
            self.ids + other.ids,
            self.texts + other.texts,
        )
