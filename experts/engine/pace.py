"""How much of the prompts a pass may read while somebody is answering.

Prompts are read in chunks beside the answers (Sarathi-Serve, Agrawal et al. 2024), so that a long prompt does not stall those
who are answering. How long a chunk takes depends on the machine, the model and how much stands before it, so it is measured.
"""

from __future__ import annotations

from .batch import MOST_PROMPT_TOKENS

STRETCH = 1.8
"""How many times longer a pass may take that reads prompts than one that does not."""
FIRST, LEAST = 32, 4
"""Tokens before anything is measured, and at least."""
MEMORY = 0.7
"""Share of the past in what is measured; the rest is the last pass."""


class Pace:
    """Learns from the passes of one model; times are in seconds."""

    def __init__(self) -> None:
        self._plain: float | None = None  # a pass that reads no prompt
        self._token: float | None = None  # one token of a prompt

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that keep a pass within its stretch."""
        if self._plain is None or self._token is None:
            return FIRST
        return max(LEAST, min(int(self._plain * (STRETCH - 1) / self._token), MOST_PROMPT_TOKENS))

    def took(self, seconds: float, prompt_tokens: int) -> None:
        """A pass with answers in it took so long, and read so many tokens of prompts."""
        if not prompt_tokens:
            self._plain = _blend(self._plain, seconds)
        elif self._plain is not None:
            self._token = _blend(self._token, max(seconds - self._plain, 1e-9) / prompt_tokens)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
