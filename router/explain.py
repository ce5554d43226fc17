"""Why a prompt was scored as it was: the stored prompts that lie nearest, and its score against the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .artifact import RouterArtifact
from .fit import views
from .head import Floats
from .neighbours import vote
from .policy import Scores
from .rows import BACKGROUND

NEAREST = 3


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A stored prompt: where it is from, and its cosine to the one asked about. `text` only of a user's own domain."""

    source: str
    id: str
    cosine: float
    text: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """`nearest` stored prompts by domain, likeliest domain first; then the views of familiarity, as openset.py names them.

    `coverage` is what the prediction set states; `views` are the largest logit, the cosine of the nearest stored prompt and the
    neighbours' agreement; `typical` is what held-out prompts of known domains have on average of each.
    """

    scores: Scores
    nearest: Mapping[str, tuple[Neighbour, ...]]
    coverage: float
    views: tuple[float, ...]
    typical: tuple[float, ...]


def explain(artifact: RouterArtifact, embedding: Floats, version: str) -> Explanation:
    """Explain the scores of one [dimension] embedding."""
    rows = artifact.rows
    scores = artifact.scores(embedding[None], version)[0]
    cosines = rows.embeddings @ embedding
    order = np.argsort(-cosines)
    likeliest = sorted(scores.probabilities, key=lambda domain: -scores.probabilities[domain])
    nearest: dict[str, list[Neighbour]] = {name: [] for name in likeliest}
    nearest[BACKGROUND] = []
    for index in order:
        found = nearest.setdefault(rows.domains[index], [])
        if len(found) < NEAREST:
            found.append(Neighbour(rows.sources[index], rows.ids[index], float(cosines[index]), rows.texts[index]))
    votes = vote(rows, embedding[None], artifact.head.domains)
    seen = tuple(float(view) for view in views(artifact.head, votes, embedding[None])[0])
    typical = tuple(float(view) for view in artifact.open_set.centre)
    kept = {domain: tuple(found) for domain, found in nearest.items() if found}
    return Explanation(scores, kept, artifact.head.coverage, seen, typical)
