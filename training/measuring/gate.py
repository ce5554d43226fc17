"""The gate: a candidate goes live only if it is better than what it could be replaced by, on rows that it was not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .evaluate import FREE_QUESTIONS, LOWER_IS_BETTER, Results
from .forgetting import Loss, general_loss

if TYPE_CHECKING:
    from .measure import Measured

JUDGED_BY = (("accuracy",), ("token_f1", "exact_match"), ("nll",))
"""Kinds of answer: of a kind's metrics the first counts, the finer one. Pairs come before all of them."""
PAIRS = "preference"
FEWEST_ROWS = 20
"""Rows from which a difference is believed: of candidates that are no better, the bootstrap takes up to 9 % for better ones on 5
rows, and 5 % on 20, where 2.5 % would be right."""
KEPT = 0.75
"""Share of the free questions that the base answers in sentences which a candidate must answer so too."""
MOST_FORGOTTEN = 0.25
"""Nats a token of general answers that a candidate may lose to its base."""


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
            f"; but {self.rows} {'row is' if self.rows == 1 else 'rows are'} too few to tell, {FEWEST_ROWS} are needed"
            if self.rows < FEWEST_ROWS
            else ""
        )
        return f"{self.gain:+.4f} a task (95 % interval {self.low:+.4f} to {self.high:+.4f}){silent}{few}"

    def __str__(self) -> str:
        return f"{'better' if self.passed else 'not better'}: {self.numbers}"


@dataclass(frozen=True, slots=True)
class Guard:
    """Something beside the tasks that must not have suffered, and a sentence on it."""

    passed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdicts:
    """A candidate against each of those that it could be replaced by, and what must not have suffered."""

    against: Mapping[str, Verdict]
    guards: tuple[Guard, ...] = ()

    @property
    def passed(self) -> bool:
        """Better than every one of them, and nothing has suffered."""
        better = all(verdict.passed for verdict in self.against.values())
        return better and all(guard.passed for guard in self.guards)

    def __str__(self) -> str:
        sentences = [f"{_word(verdict)} than {who}: {verdict.numbers}" for who, verdict in self.against.items()]
        winners = [who for who, verdict in self.against.items() if verdict.worse]
        told = [*(f"{who[0].upper()}{who[1:]} wins" for who in winners), *(guard.sentence for guard in self.guards)]
        return ". ".join(["; ".join(sentences), *told])


def decide(measured: Measured) -> Verdicts:
    """Whether a candidate that was measured may go live.

    It must be better than its base beyond doubt. Where an expert is live it must be better than that beyond doubt too: one that
    cannot be told from it would be a change without a gain. It must still answer free questions in sentences; it must not have
    forgotten more than `MOST_FORGOTTEN`, beyond doubt; and with retrieved passages it must not be worse than the base with the
    same, beyond doubt (*Fine-Tuning or Fine-Failing? Debunking Performance Myths in Large Language Models*).
    """
    candidate, base, live = measured.results["candidate"], measured.results["base"], measured.results.get("live")
    against, guards = {"the base": judge(candidate, base)}, []
    if live:
        against["the live expert"] = judge(_without_questions(candidate), _without_questions(live))
        guards += _replacing(against["the live expert"])
    if measured.with_context:
        guards.append(_reading(judge(measured.with_context["candidate"], measured.with_context["base"])))
    return Verdicts(
        against, (*guards, _remembering(general_loss(measured.general["candidate"], measured.general["base"])))
    )


def judge(candidate: Results, reference: Results, *, samples: int = 2000, seed: int = 0) -> Verdict:
    """Compare paired rows by bootstrap within each task. Passes where the whole interval is above zero.

    A task counts once, by the mean over its rows, so that no large task speaks for all; those with fewer rows than
    `FEWEST_ROWS` are counted as one, with the next larger where that is too few still. Free questions are no task: there the
    candidate must keep `KEPT` of what the reference does.
    """
    rng = np.random.default_rng(seed)
    gains = _together(_gains(judged(candidate), judged(reference)))
    resampled = [gain[rng.integers(0, len(gain), (samples, len(gain)))].mean(axis=1) for gain in gains]
    low, high = np.quantile(np.mean(resampled, axis=0), (0.025, 0.975))
    gain = float(np.mean([gain.mean() for gain in gains]))
    return Verdict(gain, float(low), float(high), _talks(candidate, reference), min(map(len, gains)))


def judged(results: Results) -> Results:
    """Those of the results that a candidate is judged by: of each row of a task one, by `JUDGED_BY`.

    A task whose rows are preference pairs, at least half of them, is judged by these alone.
    """
    found: Results = {}
    for task in sorted({task for task, _ in results} - {FREE_QUESTIONS}):
        kinds = [next((name for name in names if (task, name) in results), None) for names in JUDGED_BY]
        keys = [(task, name) for name in kinds if name]
        pairs = results.get((task, PAIRS), [])
        if pairs and 2 * len(pairs) >= sum(len(results[key]) for key in keys):
            keys = [(task, PAIRS)]
        found |= {key: results[key] for key in keys}
    return found


def _gains(candidate: Results, reference: Results) -> list[npt.NDArray[np.float64]]:
    """What the candidate is better by on each row, task by task."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for (task, metric), values in candidate.items():
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        tasks[task] += [sign * (ours - theirs) for ours, theirs in zip(values, reference[task, metric], strict=True)]
    return [np.array(values, np.float64) for values in tasks.values()]


def _together(gains: Sequence[npt.NDArray[np.float64]]) -> list[npt.NDArray[np.float64]]:
    """Tasks of `FEWEST_ROWS` rows at least: the smallest are put together for as long as there are smaller ones."""
    tasks = sorted(gains, key=len)
    while len(tasks) > 1 and len(tasks[0]) < FEWEST_ROWS:
        tasks = sorted([np.concatenate(tasks[:2]), *tasks[2:]], key=len)
    return tasks


def _replacing(verdict: Verdict) -> list[Guard]:
    if verdict.passed or verdict.worse:
        return []
    return [Guard(False, "It cannot be told from the live expert, so nothing would be gained by replacing that")]


def _reading(verdict: Verdict) -> Guard:
    word = "worse than" if verdict.worse else "better than" if verdict.passed else "not worse beyond doubt than"
    return Guard(not verdict.worse, f"With retrieved passages it is {word} the base with the same: {verdict.numbers}")


def _remembering(loss: Loss) -> Guard:
    forgot = loss.low > MOST_FORGOTTEN
    limit = f"more than {MOST_FORGOTTEN}, so it has forgotten too much" if forgot else f"{MOST_FORGOTTEN} may be lost"
    return Guard(not forgot, f"Its loss of general skill is {loss.numbers}: {limit}")


def _without_questions(results: Results) -> Results:
    return {key: values for key, values in results.items() if key[0] != FREE_QUESTIONS}


def _word(verdict: Verdict) -> str:
    return "better" if verdict.passed else "worse" if verdict.worse else "not better"


def _talks(candidate: Results, reference: Results) -> bool:
    shares = [np.mean(results.get((FREE_QUESTIONS, "in_sentences"), [1.0])) for results in (candidate, reference)]
    return bool(shares[0] >= KEPT * shares[1])
