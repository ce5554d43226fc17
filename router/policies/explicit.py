"""Whom the caller asked for."""

from __future__ import annotations

from ...schema import Decision
from ..policy import Scores


def explicit(scores: Scores, expert: str) -> Decision:
    """The expert that was asked for by name, whatever the router thinks."""
    return scores.decide(scores.domain if scores.known else None, ((expert, 1.0),), "explicit")
