"""Score an expert beside others on the same rows.

Rows with choices are scored by likelihood: the choice with the highest mean log-probability a token is the answer, so a model
that does not follow instructions is not punished for its manners. Other rows are generated greedily and compared as text, or,
for long answers, scored by their negative log-likelihood a token. Free answers of more than a few words may be compared with what
was wanted in meaning too, and of a preference pair it counts which of the two is likelier.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...models.chat import ChatEncoder
from ...schema import Message, Score
from ..rows.examples import Example
from ..rows.wording import ask, wording_of
from .answerer import Answerer, Question
from .calibration import brier, chances
from .similarity import Similar

ANSWER_TOKENS = 64
"""Longest answer that is generated for a row."""
LIKELIHOOD_TOKENS = 256
"""Tokens of a long answer on which its likelihood is measured: its first."""
FREE_QUESTIONS = "free_questions"
"""The pseudo-task of the probes; its metric is the share that is answered in sentences, not with a label."""
SHORTEST_SENTENCE = 12
"""Words from which an answer to a free question counts as sentences."""
FEW_WORDS = 5
"""Answers of up to so many words are met or missed; longer ones may be near."""
SAID_TOKENS = 128
"""Longest answer that is generated to be compared in meaning, and as much as the answer that was wanted is compared with."""
LOWER_IS_BETTER = frozenset({"nll", "nll_with_context", "ece", "brier", "general_loss"})
Results = dict[tuple[str, str], list[float]]
"""(task, metric) -> one value a row, in the order of the rows."""
_Work = tuple[list[int], list[int], list[int], list[int]]
Put = Callable[[str], str]
"""From a question to what the model reads of it: the same with passages quoted before it, say."""


def as_it_is(question: str) -> str:
    """The question, and nothing before it."""
    return question


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores rows with one answerer; `chat` and `put` are how they are put to it.

    `spoken` are the answers that are generated and compared as text: `short` ones; `closed`, those out of a closed set too, where
    likelihoods are dear; or `all`, where there are none. With `similar`, free answers of more than `FEW_WORDS` words are
    generated and compared with that as well; where `calibrated`, rows with choices tell how sure the answerer was.
    """

    answerer: Answerer
    chat: ChatEncoder
    spoken: Literal["short", "closed", "all"] = "short"
    similar: Similar | None = None
    calibrated: bool = False
    put: Put = as_it_is

    def score(
        self, rows: Sequence[Example], progress: Callable[[int, int], None] | None = None
    ) -> list[Mapping[str, float]]:
        """The metrics of each row, in the order of `rows`."""
        work, said = self._work(rows), dict[int, str]()
        steps = sum(map(len, work))
        results: list[dict[str, float]] = [{} for _ in rows]
        for done, (at, metrics) in enumerate(self._scored(rows, work, said), 1):
            results[at] |= metrics
            if progress:
                progress(done, steps)
        for at, metrics in self._similar(rows, said):
            results[at] |= metrics
        return [*results]

    def _work(self, rows: Sequence[Example]) -> _Work:
        """Places of rows: those that are compared as text, those whose likelihood counts, of these the long ones, and pairs."""
        spoken = [at for at, row in enumerate(rows) if self._is_spoken(row)]
        likely = sorted({*range(len(rows))} - {*spoken})
        long = [at for at in likely if self.similar and not rows[at].choices]
        pairs = [at for at, row in enumerate(rows) if row.rejected and self.spoken != "all"]
        return spoken, likely, long, pairs

    def _scored(
        self, rows: Sequence[Example], work: _Work, said: dict[int, str]
    ) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Places in `rows` and their metrics; `said` is filled with what was generated."""
        spoken, likely, long, pairs = work
        for at in self._say(rows, spoken, ANSWER_TOKENS, said):
            yield at, _compared(rows[at], said[at])
        found = self.answerer.logprobs([self._question(rows[at]) for at in likely])
        for at, logprobs in zip(likely, found, strict=True):
            yield at, self._likelihood(rows[at], logprobs)
        for at in self._say(rows, long, SAID_TOKENS, said):
            yield at, {}
        asked = [(self._prompt(rows[at]), pair_of(rows[at], self.chat)) for at in pairs]
        for at, (better, worse) in zip(pairs, self.answerer.logprobs(asked), strict=True):
            yield at, {"preference": float(np.mean(better) > np.mean(worse))}

    def _say(self, rows: Sequence[Example], places: Sequence[int], most: int, said: dict[int, str]) -> Iterator[int]:
        answers = self.answerer.generate([self._prompt(rows[at]) for at in places], most)
        for at, answer in zip(places, answers, strict=True):
            said[at] = self.chat.decode(answer)
            yield at

    def _similar(self, rows: Sequence[Example], said: Mapping[int, str]) -> Iterator[tuple[int, Mapping[str, float]]]:
        if self.similar:
            places = [at for at in said if not rows[at].choices and len(rows[at].answer.split()) > FEW_WORDS]
            wanted = [self.chat.decode(self.chat.text(rows[at].answer)[:SAID_TOKENS]) for at in places]
            yield from zip(places, self.similar([said[at] for at in places], wanted), strict=True)

    def _is_spoken(self, row: Example) -> bool:
        if self.spoken == "all":
            return True
        return self.spoken == "closed" if row.choices else not self._is_long(row)

    def _is_long(self, row: Example) -> bool:
        """Whether the answer is scored by its likelihood: it would not be met word by word."""
        return wording_of(row).metric == "likelihood" or self.chat.count(row.answer) > ANSWER_TOKENS

    def _prompt(self, row: Example) -> list[int]:
        return prompt_of(row, self.chat, self.put)

    def _question(self, row: Example) -> Question:
        return self._prompt(row), answers_of(row, self.chat)

    def _likelihood(self, row: Example, logprobs: Sequence[Sequence[float]]) -> Mapping[str, float]:
        """From the log-probabilities of the row's choices, or of its answer alone."""
        means = [float(np.mean(one)) for one in logprobs]
        if not row.choices:
            return {"nll": -means[0]}
        accuracy = {"accuracy": float(row.choices[int(np.argmax(means))] == row.answer)}
        if not self.calibrated:
            return accuracy
        shares = chances(means)
        truth = [choice == row.answer for choice in row.choices]
        return {**accuracy, "confidence": float(shares.max()), "brier": brier(shares, truth)}


def prompt_of(row: Example, chat: ChatEncoder, put: Put = as_it_is) -> list[int]:
    """The row as it is asked, in its first wording, of a model with this template: after its history."""
    return chat.encode([*row.history, Message("user", put(ask(row)))])


def answer_of(row: Example, chat: ChatEncoder) -> list[int]:
    """The row's answer, as much of it as its likelihood is measured on."""
    return chat.text(row.answer)[:LIKELIHOOD_TOKENS]


def answers_of(row: Example, chat: ChatEncoder) -> list[list[int]]:
    """Those whose likelihoods tell how well the row is answered: its choices, or its answer alone."""
    return [chat.text(choice) for choice in row.choices] or [answer_of(row, chat)]


def pair_of(row: Example, chat: ChatEncoder) -> list[list[int]]:
    """The answer of a preference pair, and the one that it is preferred to."""
    return [answer_of(row, chat), chat.text(row.rejected)[:LIKELIHOOD_TOKENS]]


def question_of(row: Example, chat: ChatEncoder) -> Question:
    """The row with those whose likelihoods tell how well it is answered."""
    return prompt_of(row, chat), answers_of(row, chat)


def _compared(row: Example, answer: str) -> Mapping[str, float]:
    if row.source == FREE_QUESTIONS:
        return {"in_sentences": float(len(answer.split()) >= SHORTEST_SENTENCE)}
    same = same_text(answer, row.answer, case=wording_of(row).case)
    if row.choices:
        return {"accuracy": float(same)}
    return {"exact_match": float(same), "token_f1": token_f1(answer, row.answer)}


def probes(domain: str) -> list[Example]:
    """Free questions that nobody trains on: the domain's, or general ones for a domain that has none."""
    import yaml

    questions = yaml.safe_load((Path(__file__).parent / "probes.yaml").read_text("utf-8"))
    texts = questions.get(domain, questions["general"])
    return [Example(text, "", f"probe-{number}", FREE_QUESTIONS) for number, text in enumerate(texts, 1)]


def by_task(rows: Sequence[Example], scores: Sequence[Mapping[str, float]]) -> Results:
    """Gather the rows' metrics by task."""
    results: Results = defaultdict(list)
    for row, metrics in zip(rows, scores, strict=True):
        for metric, value in metrics.items():
            results[row.source, metric].append(value)
    return dict(results)


def same_text(answer: str, reference: str, *, case: bool) -> bool:
    """Whether two answers agree but for white space, a closing full stop and, unless `case` matters, capitals."""
    ours, theirs = (" ".join(text.split()).removesuffix(".") for text in (answer, reference))
    return ours == theirs if case else ours.casefold() == theirs.casefold()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over white-space tokens (SQuAD's F1)."""
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values())) if common else 0.0


def compare(
    candidate: Results,
    base: Results,
    beside: Mapping[str, Results] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[Score, ...]:
    """A `Score` for each task and metric, with the candidate's 95 % bootstrap interval, the base's value and those of others."""
    rng = np.random.default_rng(seed)
    out = []
    for key, values in sorted(candidate.items()):
        low, high = interval(np.asarray(values), rng, samples)
        others = {who: mean(results[key]) for who, results in (beside or {}).items()}
        out.append(Score(*key, mean(values), low, high, mean(base[key]), len(values), others))
    return tuple(out)


def interval(values: np.ndarray, rng: np.random.Generator, samples: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean (Efron, 1979)."""
    means = values[rng.integers(0, len(values), (samples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def flat(results: Results) -> list[list[Any]]:
    """As JSON-ready values; `deep` reads them back."""
    return [[task, metric, values] for (task, metric), values in results.items()]


def deep(rows: Sequence[Sequence[Any]]) -> Results:
    """Read what `flat` wrote."""
    return {(task, metric): list(values) for task, metric, values in rows}


def mean(values: Sequence[float]) -> float:
    """The mean, to four digits."""
    return round(float(np.mean(values)), 4)
