"""What a remote black box costs in calls, with drafting and without, and how far its top k log-probabilities are from all.

The server is one of the tests, over the real large model on this machine; the error needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from proxy_adapters import Rows

from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import log_sum_exp
from collegium.experts.engine.request import Request
from collegium.experts.engine.steering import LogitArithmetic
from collegium.experts.engine.tail import completed, total_variation
from collegium.experts.proxy import Pair
from collegium.experts.remote.expert import RemoteExpert
from collegium.experts.remote.vocabulary import Vocabulary
from collegium.models.cache import CachedModel
from collegium.schema import Card, Combination, ExpertRequest, Message, Paid, Remote, Sampling
from collegium.tests.remote_server import Model, serving
from collegium.training.measuring.answerer import run_all
from collegium.training.measuring.evaluate import answer_of, prompt_of
from collegium.training.rows.examples import Example
from collegium.training.rows.wording import ask

if TYPE_CHECKING:
    from proxy import Contest

QUESTIONS, TOKENS = 5, 60
ANSWERS, ANSWER_TOKENS = 10, 40
TOPS = (1, 5, 20, 100, 1000)
DRAFT = 8
ALPHA = 0.8


def call_figures(task: str, contest: Contest, base: CachedModel, rows: Rows) -> dict[str, Any]:
    """Calls a hundred tokens, and what of the drafts was accepted."""
    figures: dict[str, Any] = {}
    with serving(Model(base.folder)) as server:
        for name, draft, prompt in (("single", 0, "none"), ("drafted", DRAFT, "field")):
            with server.acting(top=20, prompt=prompt):
                answers = [_answer(contest, server.url, row, draft) for row in rows.test[:QUESTIONS]]
            paid = [one for _, one in answers]
            tokens = sum(count for count, _ in answers)
            figures[f"{task}_{name}_calls_per_100_tokens"] = round(100 * sum(one.calls for one in paid) / tokens, 1)
            if draft:
                share = sum(one.accepted for one in paid) / max(1, sum(one.drafted for one in paid))
                figures[f"{task}_draft_accepted"] = round(share, 3)
    singly, drafted = (figures[f"{task}_{name}_calls_per_100_tokens"] for name in ("single", "drafted"))
    return figures | {f"{task}_calls_ratio": round(drafted / singly, 3)}


def _answer(contest: Contest, url: str, row: Example, draft: int) -> tuple[int, Paid]:
    """Tokens of an answer, and what was paid for them, the asking for capabilities left out."""
    host = replace(contest.host, settings=contest.host.settings.model_copy(update={"remote_draft": draft}))
    spec = Remote(url, f"large-{draft}", contest.tuned.version, 0, combination=Combination("proxy", ALPHA))
    pair = Pair(host, host.models.open(contest.small), contest.tuned, None)
    expert = RemoteExpert(Card("remote", "", spec, host.base), spec, pair, Vocabulary.of(host), None)
    request = ExpertRequest((Message("user", ask(row)),), "remote", sampling=Sampling(max_tokens=TOKENS))
    generation = expert.start(request)
    tokens = sum(len(delta.token_ids) for delta in generation)
    assert generation.paid
    return tokens, generation.paid


class _Error:
    """In place of a combiner, of large, tuned and untuned: keeps how far each k is from the whole, steered and not."""

    rows = 3

    def __init__(self) -> None:
        self.plain: list[list[float]] = []
        self.steered: list[list[float]] = []

    def __call__(self, logits: Sequence[Floats], generated: Sequence[int]) -> Floats:
        """The large model's row."""
        large, tuned, untuned = logits
        steer = LogitArithmetic(ALPHA)
        guesses = [completed(_known(large, top), untuned) for top in TOPS]
        whole = steer([large, tuned, untuned])
        self.plain.append([total_variation(large, guess) for guess in guesses])
        self.steered.append([total_variation(whole, steer([guess, tuned, untuned])) for guess in guesses])
        return large


def _known(logits: Floats, top: int) -> Floats:
    """Log-probabilities of the likeliest, as a server tells them; -inf for the others."""
    logprobs: Floats = logits - np.float32(log_sum_exp(logits))
    known: Floats = np.full_like(logprobs, -np.inf)
    best = np.argpartition(-logprobs, top)[:top]
    known[best] = logprobs[best]
    return known


def tail_error(contest: Contest, rows: Sequence[Example]) -> dict[str, Any]:
    """Mean total variation distance by k, over the tokens of some answers."""
    chat = contest.host.chat
    make, errors = contest.rows(("large", "tuned", "untuned")), [_Error() for _ in rows[:ANSWERS]]
    requests = [
        Request(make(prompt_of(row, chat)), error, forced=tuple(answer_of(row, chat)[:ANSWER_TOKENS]))
        for row, error in zip(rows[:ANSWERS], errors, strict=True)
    ]
    for _ in run_all(contest.host.engine, requests):
        pass
    figures: dict[str, Any] = {}
    for name in ("plain", "steered"):
        means = np.mean([place for error in errors for place in getattr(error, name)], axis=0)
        figures |= {f"top{top}_tv_{name}": round(float(mean), 4) for top, mean in zip(TOPS, means, strict=True)}
    return figures
