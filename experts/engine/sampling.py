"""From the logits of one distribution to one token: first penalties, then masks, then a draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InvalidRequest
from ...schema import Sampling
from .batch import Floats
from .combine import log_sum_exp
from .distribution import COLDEST, best, distribution, likeliest, pick

Mask = Callable[[Floats, Sequence[int]], None]
"""Changes logits in place, given the tokens generated so far: the door for grammars. -inf forbids a token."""

RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, 20),
    "min_tokens": (0, math.inf),
}


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token. `logprob`, and `top` for the likeliest (id, log-probability), best first, where asked for.

    Log-probabilities are those of the distribution that came in: before masks, penalties, temperature and filters.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None


class Sampler:
    """Draws the tokens of one answer; keeps what it has drawn. With a seed, draws depend on it and on the logits alone.

    Raises InvalidRequest where `sampling` holds a value out of its range.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], end: int, seed: int | None, masks: Sequence[Mask] = ()
    ) -> None:
        _check(sampling)
        self._sampling = sampling
        self._end = end
        self._masks = masks
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)
        self._seen = np.unique(np.asarray(prompt, np.intp))
        self._counts: dict[int, int] = {}
        self._generated: list[int] = []

    def draw(self, logits: Floats) -> Token:
        """The next token; `logits` is `[vocab]` and stays as it is. Raises CollegiumError where there is none to draw."""
        weighed = self._weighed(logits)
        token = best(weighed)
        if self._sampling.temperature >= COLDEST:
            token = pick(distribution(weighed, self._sampling), self._random)
        self._take(token)
        if self._sampling.logprobs is None:
            return Token(token, None, None)
        total = log_sum_exp(logits)
        top = likeliest(logits, self._sampling.logprobs)
        return Token(token, float(logits[token]) - total, tuple((one, float(logits[one]) - total) for one in top))

    def _weighed(self, logits: Floats) -> Floats:
        """The logits with penalties and masks; themselves where there are none."""
        sampling, counts = self._sampling, self._counts
        repeats = sampling.repetition_penalty != 1
        spends = bool(counts) and (sampling.presence_penalty != 0 or sampling.frequency_penalty != 0)
        early = len(self._generated) < sampling.min_tokens
        if not (repeats or spends or early or self._masks):
            return logits
        best(logits)  # raises for what a mask would hide
        logits = logits.copy()
        if repeats:
            old = logits[self._seen]
            logits[self._seen] = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
        if spends:
            times = np.fromiter(counts.values(), np.float32, len(counts))
            cost = sampling.presence_penalty + sampling.frequency_penalty * times
            logits[np.fromiter(counts, np.intp, len(counts))] -= cost
        if early:
            logits[self._end] = -np.inf
        for mask in self._masks:
            mask(logits, self._generated)
        return logits

    def _take(self, token: int) -> None:
        if self._sampling.repetition_penalty != 1 and token not in self._counts:
            self._seen = np.append(self._seen, token)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._generated.append(token)


def one_of(answers: Sequence[Sequence[int]], end: int) -> Mask:
    """Allow only what continues one of the answers, then the end: the smallest grammar. Raises InvalidRequest."""
    if not answers or any(end in answer for answer in answers):
        raise InvalidRequest("There are no answers, or one holds the end token.", hint="Give at least one, without it.")
    following: dict[tuple[int, ...], set[int]] = {}
    for answer in answers:
        for at, token in enumerate((*answer, end)):
            following.setdefault(tuple(answer[:at]), set()).add(token)

    def mask(logits: Floats, generated: Sequence[int]) -> None:
        allowed = list(following.get(tuple(generated), ()))
        kept = logits[allowed]
        logits.fill(-np.inf)
        logits[allowed] = kept

    return mask


def _check(sampling: Sampling) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise InvalidRequest(f"{name} is {value}.", hint=f"Give a number from {low:g} to {high:g}.")
