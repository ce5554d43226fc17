"""What another router would have decided: the embeddings of past decisions, scored again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..schema import Decision
from .head import Floats
from .policy import Scores

Change = tuple[str | None, str | None]


class Past(Protocol):
    """A decision with what it rests on."""

    @property
    def decision(self) -> Decision:
        """What was decided."""

    @property
    def embedding(self) -> Floats:
        """Of the prompt, [dimension]."""

    @property
    def encoder(self) -> str:
        """The identity of what made the embedding."""

    @property
    def domains(self) -> tuple[str, ...] | None:
        """Those that the choice was limited to; None where it was not."""


@dataclass(frozen=True, slots=True)
class Replay:
    """How many decisions would be the `same`, and how many of each (domain, other domain) would change, most first.

    A domain is None where nothing fits. `elsewhere` counts, by encoder, the decisions that rest on another one: they cannot be
    compared.
    """

    same: int
    changes: Mapping[Change, int]
    elsewhere: Mapping[str, int]


def replay(past: Sequence[Past], encoder: str, score: Callable[[Floats], list[Scores]]) -> Replay:
    """Compare what was measured with what `score` says of the same embeddings [n, dimension] of `encoder`.

    Compared are the routers' own verdicts, whoever answered in the end: a conversation may stay with its expert, and an expert
    may be asked for by name, whatever the router says.
    """
    here = [one for one in past if one.encoder == encoder]
    scores = score(np.stack([one.embedding for one in here])) if here else []
    pairs = Counter((_then(one.decision), _now(new, one.domains)) for one, new in zip(here, scores, strict=True))
    changes = {pair: count for pair, count in pairs.most_common() if pair[0] != pair[1]}
    elsewhere = Counter(one.encoder for one in past if one.encoder != encoder)
    return Replay(pairs.total() - sum(changes.values()), changes, dict(elsewhere.most_common()))


def _then(decision: Decision) -> str | None:
    known = decision.confidence >= decision.threshold
    return max(decision.probabilities, key=decision.probabilities.__getitem__) if known else None


def _now(scores: Scores, domains: Collection[str] | None) -> str | None:
    allowed = {name: p for name, p in scores.probabilities.items() if domains is None or name in domains}
    return max(allowed, key=allowed.__getitem__) if scores.known and allowed else None
