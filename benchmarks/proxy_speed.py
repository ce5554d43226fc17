"""How fast a proxied expert answers beside the large model alone and the small expert alone: one stream, interleaved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.experts.combination import formula
from collegium.experts.engine.combine import Combiner, Identity
from collegium.experts.engine.request import Request, Row
from collegium.schema import Combination, Message, Sampling
from collegium.training.rows.examples import Example
from collegium.training.rows.wording import ask

if TYPE_CHECKING:
    from proxy import Contest

ROUNDS, TOKENS = 9, 96


def speed_figures(contest: Contest, rows: Sequence[Example]) -> dict[str, Any]:
    """Tokens a second after the first; the ratios are medians over rounds in which all take their turn."""
    chat = contest.host.chat
    prompts = [chat.encode([Message("user", ask(row))]) for row in rows[:ROUNDS]]
    asked = formula(Combination("proxy", 1.0))
    learned = formula(Combination("comblm", weights=(0.1,) * 8))
    contestants: dict[str, tuple[Sequence[str], Combiner]] = {
        "large": (["large"], Identity()),
        "expert": (["tuned"], Identity()),
        "proxy": (asked.parts, asked.combiner),
        "comb": (learned.parts, learned.combiner),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for prompt in prompts:
        for name, (parts, combiner) in contestants.items():
            found[name].append(_tokens_a_second(contest, contest.rows(parts)(prompt), combiner))
    large, expert = np.array(found["large"]), np.array(found["expert"])
    figures: dict[str, Any] = {f"{name}_tokens_s": round(float(np.median(one)), 1) for name, one in found.items()}
    figures["proxy_speed_ratio"] = round(float(np.median(found["proxy"] / large)), 3)
    figures["proxy_over_expert"] = round(float(np.median(found["proxy"] / expert)), 3)
    figures["comb_speed_ratio"] = round(float(np.median(found["comb"] / large)), 3)
    return figures


def _tokens_a_second(contest: Contest, rows: tuple[Row, ...], combiner: Combiner) -> float:
    sampling = Sampling(max_tokens=TOKENS, min_tokens=TOKENS)
    times = [
        time.perf_counter()
        for delta in contest.host.engine.submit(Request(rows, combiner, sampling))
        if delta.token_ids
    ]
    return (len(times) - 1) / (times[-1] - times[0])
