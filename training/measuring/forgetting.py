"""What an expert has forgotten of what everybody's model knows: facts, sums, words, and doing what it is told.

*A Closer Look at the Limitations of Instruction Tuning* measures that tuning costs knowledge, *Balancing Specialized and General
Skills in LLMs: The Impact of Modern Tuning and Data Strategy* measures both sides. Here a fixed probe is put to the expert and to
its base: general.yaml, which nobody trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ...models.chat import ChatEncoder
from ...schema import Message, Score
from ..rows.examples import Example
from .answerer import Answerer
from .evaluate import Results, answers_of, compare, interval, mean

GENERAL = "general_skill"
"""The pseudo-task of the probe: `nll` of its answers in sentences, `general_accuracy` of its closed questions."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a candidate lost to its base in nats a token of general answers, with the 95 % interval; below zero it gained."""

    nats: float
    low: float
    high: float

    @property
    def numbers(self) -> str:
        """The loss and its interval."""
        return f"{self.nats:+.2f} nats a token of general answers (95 % interval {self.low:+.2f} to {self.high:+.2f})"


@cache
def general_rows() -> tuple[Example, ...]:
    """The probe, as rows."""
    import yaml

    probe = yaml.safe_load((Path(__file__).parent / "general.yaml").read_text("utf-8"))
    rows = [Example(one["ask"], one["answer"], f"general-{at}", GENERAL) for at, one in enumerate(probe["answers"], 1)]
    for at, one in enumerate(probe["choices"], 1):
        rows.append(Example(one["ask"], one["choices"][0], f"choice-{at}", GENERAL, choices=tuple(one["choices"])))
    return tuple(rows)


def recall(answerer: Answerer, chat: ChatEncoder, progress: Callable[[int, int], None] | None = None) -> Results:
    """What somebody makes of the probe."""
    rows = general_rows()
    results: Results = {(GENERAL, "nll"): [], (GENERAL, "general_accuracy"): []}
    # The choices are not named in the question: where they were, a small model did no better than by chance.
    prompts = [chat.encode([Message("user", row.prompt)]) for row in rows]
    found = answerer.logprobs([(prompt, answers_of(row, chat)) for prompt, row in zip(prompts, rows, strict=True)])
    for done, (row, logprobs) in enumerate(zip(rows, found, strict=True), 1):
        means = [float(np.mean(one)) for one in logprobs]
        if row.choices:
            right = row.choices[int(np.argmax(means))] == row.answer
            results[GENERAL, "general_accuracy"].append(float(right))
        else:
            results[GENERAL, "nll"].append(-means[0])
        if progress:
            progress(done, len(rows))
    return results


def general_loss(candidate: Results, base: Results, *, seed: int = 0) -> Loss:
    """The mean over the probe's answers of what the candidate's NLL a token is above the base's, with a bootstrap interval."""
    lost = np.asarray(candidate[GENERAL, "nll"]) - np.asarray(base[GENERAL, "nll"])
    low, high = interval(lost, np.random.default_rng(seed))
    return Loss(mean(lost), low, high)


def general_scores(general: Mapping[str, Results]) -> list[Score]:
    """For the card: the candidate's loss, which the base does not have, and its accuracy; beside them those of a live expert."""
    base = general["base"]
    losses = {who: general_loss(results, base) for who, results in general.items()}
    ours, rows = losses["candidate"], len(base[GENERAL, "nll"])
    beside = {"live": losses["live"].nats} if "live" in losses else {}
    accuracy = {who: {(GENERAL, "general_accuracy"): one[GENERAL, "general_accuracy"]} for who, one in general.items()}
    live = {"live": accuracy["live"]} if "live" in accuracy else None
    return [
        *compare(accuracy["candidate"], accuracy["base"], live),
        Score(GENERAL, "general_loss", ours.nats, ours.low, ours.high, 0.0, rows, beside),
    ]
