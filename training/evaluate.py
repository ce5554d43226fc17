"""Score an expert beside others on the same rows.

Rows with choices are scored by likelihood: the choice with the highest mean log-probability a token is the answer, so a model
that does not follow instructions is not punished for its manners. Other rows are generated greedily and compared as text, or,
for long answers, scored by their negative log-likelihood a token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..models.chat import ChatEncoder
from ..schema import Message, Score
from .answerer import Answerer, Question
from .examples import Example
from .wording import ask, wording_of

ANSWER_TOKENS = 64
"""Longest answer that is generated for a row."""
LIKELIHOOD_TOKENS = 256
"""Tokens of a long answer on which its likelihood is measured: its first."""
FREE_QUESTIONS = "free_questions"
"""The pseudo-task of the probes; its metric is the share that is answered in sentences, not with a label."""
SHORTEST_SENTENCE = 12
"""Words from which an answer to a free question counts as sentences."""
LOWER_IS_BETTER = frozenset({"nll"})
Results = dict[tuple[str, str], list[float]]
"""(task, metric) -> one value a row, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores rows with one answerer; `chat` is how they are put to it.

    `spoken` are the answers that are generated and compared as text: `short` ones; `closed`, those out of a closed set too, where
    likelihoods are dear; or `all`, where there are none.
    """

    answerer: Answerer
    chat: ChatEncoder
    spoken: Literal["short", "closed", "all"] = "short"

    def score(
        self, rows: Sequence[Example], progress: Callable[[int, int], None] | None = None
    ) -> list[Mapping[str, float]]:
        """The metrics of each row, in the order of `rows`."""
        results: dict[int, Mapping[str, float]] = {}
        for at, metrics in self._scored(rows):
            results[at] = metrics
            if progress:
                progress(len(results), len(rows))
        return [results[at] for at in range(len(rows))]

    def _scored(self, rows: Sequence[Example]) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Places in `rows` and their metrics: first of those that are compared as text, then of the others."""
        spoken = [at for at, row in enumerate(rows) if self._is_spoken(row)]
        answers = self.answerer.generate([prompt_of(rows[at], self.chat) for at in spoken], ANSWER_TOKENS)
        for at, answer in zip(spoken, answers, strict=True):
            yield at, _compared(rows[at], self.chat.decode(answer))
        others = sorted({*range(len(rows))} - {*spoken})
        found = self.answerer.logprobs([question_of(rows[at], self.chat) for at in others])
        for at, logprobs in zip(others, found, strict=True):
            yield at, _likelihood(rows[at], logprobs)

    def _is_spoken(self, row: Example) -> bool:
        if self.spoken == "all":
            return True
        return self.spoken == "closed" if row.choices else not self._is_long(row)

    def _is_long(self, row: Example) -> bool:
        """Whether the answer is scored by its likelihood: it would not be met word by word."""
        return wording_of(row).metric == "likelihood" or self.chat.count(row.answer) > ANSWER_TOKENS


def prompt_of(row: Example, chat: ChatEncoder) -> list[int]:
    """The row as it is asked, in its first wording, of a model with this template."""
    return chat.encode([Message("user", ask(row))])


def answer_of(row: Example, chat: ChatEncoder) -> list[int]:
    """The row's answer, as much of it as its likelihood is measured on."""
    return chat.text(row.answer)[:LIKELIHOOD_TOKENS]


def question_of(row: Example, chat: ChatEncoder) -> Question:
    """The row with those whose likelihoods tell how well it is answered: its choices, or its answer alone."""
    return prompt_of(row, chat), [chat.text(choice) for choice in row.choices] or [answer_of(row, chat)]


def _compared(row: Example, answer: str) -> Mapping[str, float]:
    if row.source == FREE_QUESTIONS:
        return {"in_sentences": float(len(answer.split()) >= SHORTEST_SENTENCE)}
    same = same_text(answer, row.answer, case=wording_of(row).case)
    if row.choices:
        return {"accuracy": float(same)}
    return {"exact_match": float(same), "token_f1": token_f1(answer, row.answer)}


def _likelihood(row: Example, logprobs: Sequence[Sequence[float]]) -> Mapping[str, float]:
    """From the log-probabilities of the row's choices, or of its answer alone."""
    means = [float(np.mean(one)) for one in logprobs]
    if row.choices:
        return {"accuracy": float(row.choices[int(np.argmax(means))] == row.answer)}
    return {"nll": -means[0]}


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


def mean(values: Sequence[float]) -> float:
    """The mean, to four digits."""
    return round(float(np.mean(values)), 4)
