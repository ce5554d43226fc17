"""The stored prompts nearest to a prompt: which domains they are of, and how near they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .head import Floats
from .rows import Rows

NEIGHBOURS = 20
SHARPNESS = 0.05
"""Cosine by which a neighbour must be nearer to count e times as much."""
AT_ONCE = 1024
"""Prompts whose cosines to all stored ones are in memory together."""


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """`shares` [n, domains] of the neighbours' vote, rows summing to 1.

    `nearest` [n] is the cosine of the nearest neighbour of any domain, and of the farthest neighbour where all are of none;
    `agreement` [n] is the share of the likeliest domain where the background votes, too.
    """

    shares: Floats
    nearest: Floats
    agreement: Floats


def vote(rows: Rows, embeddings: Floats, domains: Sequence[str]) -> Votes:
    """Let the nearest stored prompts of each of [n, dimension] embeddings vote.

    Neighbour i adds w_i exp(s_i / t) to its domain, with its cosine s_i and its voice w_i.
    """
    parts = [_vote(rows, embeddings[at : at + AT_ONCE], domains) for at in range(0, max(1, len(embeddings)), AT_ONCE)]
    shares, nearest, agreement = (np.concatenate(each).astype(np.float32) for each in zip(*parts, strict=True))
    return Votes(shares, nearest, agreement)


def _vote(rows: Rows, embeddings: Floats, domains: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    cosines = embeddings @ rows.embeddings.T
    k = min(NEIGHBOURS, len(rows))
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    similarity = np.take_along_axis(cosines, near, axis=1)
    power = rows.voices[near] * np.exp((similarity - similarity.max(axis=1, keepdims=True)) / SHARPNESS)
    places = rows.places(domains, near)
    counted = np.stack([(power * (places == place)).sum(axis=1) for place in range(len(domains))], axis=1)
    total = counted.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, counted / np.maximum(total, 1e-30), 1 / len(domains))
    nearest = np.where(places >= 0, similarity, similarity.min(axis=1, keepdims=True)).max(axis=1)
    agreement = counted.max(axis=1) / power.sum(axis=1)
    return shares, nearest, agreement
