"""The gate: a candidate goes live only if it is better than what it could be replaced by, on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .evaluate import FREE_QUESTIONS, LOWER_IS_BETTER, Results

JUDGED_BY = ("accuracy", "token_f1", "exact_match", "nll")
"""Of a task's metrics the first of these counts: among those of one answer, the finer one."""
FEWEST_ROWS = 5
"""Rows of a task from which a difference is believed."""
KEPT = 0.75
"""Share of the free questions that the base answers in sentences which a candidate must answer so too."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`gain` is the mean over tasks of the paired difference, in each metric's own units, with its 95 % interval.

    `talks` says whether free questions are still answered in sentences, `rows` how many rows the smallest task has.
    """

    gain: float
    low: float
    high: float
    talks: bool
    rows: int

    @property
    def passed(self) -> bool:
        """Better on its tasks beyond doubt, and still able to talk."""
        return self.low > 0 and self.talks and self.rows >= FEWEST_ROWS

    @property
    def worse(self) -> bool:
        """Worse on its tasks beyond doubt."""
        return self.high < 0 and self.rows >= FEWEST_ROWS

    @property
    def numbers(self) -> str:
        """The gain and its interval, and what else stands in the way."""
        silent = "" if self.talks else "; but it answers free questions with labels instead of sentences"
        few = (
            f"; but {self.rows} {'row is' if self.rows == 1 else 'rows are'} too few to tell"
            if self.rows < FEWEST_ROWS
            else ""
        )
        return f"{self.gain:+.4f} a task (95 % interval {self.low:+.4f} to {self.high:+.4f}){silent}{few}"

    def __str__(self) -> str:
        return f"{'better' if self.passed else 'not better'}: {self.numbers}"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """A candidate against each of those that it could be replaced by."""

    against: Mapping[str, Verdict]

    @property
    def passed(self) -> bool:
        """Better than every one of them."""
        return all(verdict.passed for verdict in self.against.values())

    def __str__(self) -> str:
        sentences = [f"{_word(verdict)} than {who}: {verdict.numbers}" for who, verdict in self.against.items()]
        winners = [who for who, verdict in self.against.items() if verdict.worse]
        return ". ".join(["; ".join(sentences), *(f"{who[0].upper()}{who[1:]} wins" for who in winners)])


def judge(candidate: Results, reference: Results, *, samples: int = 2000, seed: int = 0) -> Verdict:
    """Compare paired rows by bootstrap within each task. Passes where the whole interval is above zero.

    A task counts once, by the first of its metrics in `JUDGED_BY`, so that no large task speaks for all. Free questions
    are no task: there the candidate must keep `KEPT` of what the reference does.
    """
    rng = np.random.default_rng(seed)
    first = {
        task: metric
        for metric in reversed(JUDGED_BY)
        for task in sorted({task for task, _ in candidate} - {FREE_QUESTIONS})
        if (task, metric) in candidate
    }
    gains, resampled = [], []
    for task, metric in sorted(first.items()):
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        gain = sign * (np.asarray(candidate[task, metric]) - np.asarray(reference[task, metric]))
        gains.append(gain.mean())
        resampled.append(gain[rng.integers(0, len(gain), (samples, len(gain)))].mean(axis=1))
    fewest = min(len(candidate[key]) for key in first.items())
    low, high = np.quantile(np.mean(resampled, axis=0), (0.025, 0.975))
    return Verdict(float(np.mean(gains)), float(low), float(high), _talks(candidate, reference), fewest)


def _word(verdict: Verdict) -> str:
    return "better" if verdict.passed else "worse" if verdict.worse else "not better"


def _talks(candidate: Results, reference: Results) -> bool:
    shares = [np.mean(results.get((FREE_QUESTIONS, "in_sentences"), [1.0])) for results in (candidate, reference)]
    return bool(shares[0] >= KEPT * shares[1])
