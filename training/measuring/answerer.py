"""Who is measured: something that says how likely given answers are, and gives answers of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ...errors import InvalidRequest, Overloaded
from ...experts.engine.combine import Combiner, Identity
from ...experts.engine.engine import Engine
from ...experts.engine.generation import Generation
from ...experts.engine.request import RemoteRow, Request, Row
from ...schema import Delta, Sampling

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt, and the answers to it whose likelihood is asked for."""
Rows = tuple[Row | RemoteRow, ...]
AT_ONCE = 32
"""Requests that are with the engine at once; those that find no room wait there."""
TOGETHER = 8
"""Questions whose prompts are read side by side, before their further answers follow from the engine's prefix cache."""


class Answerer(Protocol):
    """A model, or a formula over several."""

    def logprobs(self, questions: Sequence[Question]) -> Iterator[list[list[float]]]:
        """For each question in turn, the log-probability of each token of each answer."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """For each prompt in turn, a greedy answer without the end token."""
        ...


@dataclass(frozen=True, slots=True)
class EngineAnswerer:
    """A formula over rows as the engine serves it, in the precision in which it serves.

    `rows` makes a prompt's rows, `combiner` what makes one distribution of them: a new one for each answer.
    """

    engine: Engine
    rows: Callable[[Sequence[int]], Rows]
    combiner: Callable[[], Combiner] = Identity

    def logprobs(self, questions: Sequence[Question]) -> Iterator[list[list[float]]]:
        """Many answers at once. Raises what `run_all` raises, and what asking for a row raises."""
        order = list(_order([len(answers) for _, answers in questions]))
        requests = (
            Request(self.rows(questions[at][0]), self.combiner(), forced=tuple(questions[at][1][which]))
            for at, which in order
        )
        found: list[dict[int, list[float]]] = [{} for _ in questions]
        turn = 0
        for (at, which), deltas in zip(order, run_all(self.engine, requests), strict=True):
            found[at][which] = [one for delta in deltas for one in delta.logprobs or ()]
            while turn < len(questions) and len(found[turn]) == len(questions[turn][1]):
                yield [found[turn][place] for place in range(len(found[turn]))]
                found[turn] = {}
                turn += 1

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """Many at once. Raises what `run_all` raises, and what asking for a row raises."""
        greedy = Sampling(max_tokens=max_tokens)
        requests = (Request(self.rows(prompt), self.combiner(), greedy) for prompt in prompts)
        return tokens_of(run_all(self.engine, requests))


@dataclass(frozen=True, slots=True)
class SpokenAnswerer:
    """Somebody who exchanges words, and whose likelihoods nobody can tell. `texts` has the question of each prompt.

    `say` answers questions with at most so many tokens each.
    """

    say: Callable[[Sequence[str], int], Iterator[list[int]]]
    texts: Mapping[tuple[int, ...], str]

    def logprobs(self, questions: Sequence[Question]) -> Iterator[list[list[float]]]:
        """Raises InvalidRequest where any are asked for."""
        if questions:
            raise InvalidRequest("Who exchanges words tells no likelihoods.", hint="Compare what is said.")
        return iter(())

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """Raises what `say` raises."""
        return self.say([self.texts[tuple(prompt)] for prompt in prompts], max_tokens)


def tokens_of(answers: Iterable[list[Delta]]) -> Iterator[list[int]]:
    """The tokens of each answer."""
    return ([token for delta in deltas for token in delta.token_ids] for deltas in answers)


def run_all(engine: Engine, requests: Iterable[Request]) -> Iterator[list[Delta]]:
    """The deltas of each request, in order; the engine is kept busy. Raises what `in_turn` raises."""
    return in_turn((partial(engine.submit, request) for request in requests), AT_ONCE)


def in_turn(starts: Iterable[Callable[[], Generation]], at_once: int) -> Iterator[list[Delta]]:
    """The deltas of each answer, in order; so many are under way at once, and no queue is overrun.

    Raises what starting one raises and what is raised of an answer; those under way are stopped then.
    """
    running: deque[Generation] = deque()
    try:
        for start in starts:
            while True:
                try:
                    running.append(start())
                    break
                except Overloaded:
                    if not running:  # others fill the queue
                        raise
                    yield list(running.popleft())
            while len(running) >= at_once:
                yield list(running.popleft())
        while running:
            yield list(running.popleft())
    finally:
        for generation in running:
            generation.close()


def _order(answers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Places of questions with so many answers each, and of an answer of theirs: of some questions the first, then the rest."""
    for start in range(0, len(answers), TOGETHER):
        group = range(start, min(start + TOGETHER, len(answers)))
        yield from ((at, 0) for at in group)
        yield from ((at, which) for at in group for which in range(1, answers[at]))
