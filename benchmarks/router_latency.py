"""How long the router takes for a prompt, beside the same encoder through sentence-transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from router_peers import st_latency

from collegium.router.router import Router
from collegium.router.spelling import LETTERS, SHORTEST, Spelling

WORDS = """
account contract fever theorem compiler river invoice judge vaccine triangle server planet tax clause doctor prime database
acid bank statute nurse matrix kernel gravity music travel recipe garden letter window question answer
"""
SHORT, LONG = 15, 500
TIMES = 200
ERRORS = 2
"""Letters that are changed in a mistyped prompt, in a word each."""
TRIES = 100
_seeds = count()
"""One for each set of prompts: the same ones in every run, and none twice in a run, for the router remembers them."""


def latency(router: Router, folder: Path) -> dict[str, float]:
    """Milliseconds of `Router.scores` for one prompt, never the same one twice but for `p50_ms_repeated`.

    `speedup_vs_st` compares all of that, in the router's precision, with what sentence-transformers takes for encoding alone in
    float32. A mistyped prompt is read twice; an encoder whose vocabulary cannot correct words has no such figure.
    """
    short = _prompts(SHORT, TIMES)
    ours = _milliseconds(router, short)
    theirs = 1000 * st_latency(folder, _prompts(SHORT, TIMES))
    batch = _prompts(SHORT, TIMES)
    start = time.perf_counter()
    router.scores(batch)
    together = 1000 * (time.perf_counter() - start) / len(batch)
    repeated = _milliseconds(router, [short[0]] * TIMES)
    spelling = Spelling.of(folder, router.artifact.words)
    mistyped = {"p50_ms_mistyped": _median(_milliseconds(router, _mistyped(spelling)))} if spelling else {}
    return {
        "p50_ms_short": _median(ours),
        "p95_ms_short": float(np.percentile(ours, 95)),
        **mistyped,
        "p50_ms_500": _median(_milliseconds(router, _prompts(LONG, TIMES // 5))),
        "ms_in_a_batch": together,
        "p50_ms_repeated": _median(repeated),
        "st_ms_short": theirs,
        "speedup_vs_st": theirs / _median(ours),
    }


def _milliseconds(router: Router, prompts: Sequence[str]) -> list[float]:
    router.scores(prompts[:1])
    taken = []
    for prompt in prompts[1:]:
        start = time.perf_counter()
        router.scores([prompt])
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def _median(taken: Sequence[float]) -> float:
    return float(np.percentile(taken, 50))


def _mistyped(spelling: Spelling) -> list[str]:
    """Short prompts with errors that the router takes back, so that it reads each twice."""
    rng = np.random.default_rng(next(_seeds))
    out = []
    for prompt in _prompts(SHORT, TIMES):
        words = prompt.split()
        long_enough = [at for at, word in enumerate(words) if len(word) >= SHORTEST]
        for at in rng.permutation(long_enough)[:ERRORS]:
            words[at] = _misspelled(words[at], spelling, rng)
        out.append(" ".join(words))
    return out


def _misspelled(word: str, spelling: Spelling, rng: np.random.Generator) -> str:
    """The word with another letter somewhere, such that it is corrected, if not always to what it was.

    The word itself where no such letter is found: a vocabulary may lack it.
    """
    for _ in range(TRIES):
        at = int(rng.integers(len(word)))
        wrong = word[:at] + str(rng.choice(list(LETTERS))) + word[at + 1 :]
        if spelling.correct(wrong) != wrong:
            return wrong
    return word


def _prompts(tokens: int, count: int) -> list[str]:
    """Prompts of about so many tokens, each of its own."""
    rng = np.random.default_rng(next(_seeds))
    return [" ".join(rng.choice(WORDS.split(), tokens - 2)) for _ in range(count)]
