"""Likelihoods, greedy answers and scores are what the plain way of computing them gives; the gate lets the better through."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.request import Row
from collegium.experts.engine.slots import Adapter
from collegium.models.cache import CachedModel
from collegium.models.chat import ChatEncoder
from collegium.models.load import load_lm, load_tokenizer, pick_device
from collegium.schema import Message
from collegium.tests.engine_doubles import is_idle, open_decoder, until
from collegium.training.answerer import EngineAnswerer, SpokenAnswerer, TorchAnswerer
from collegium.training.evaluate import (
    FREE_QUESTIONS,
    Results,
    Scorer,
    by_task,
    compare,
    interval,
    probes,
    prompt_of,
    same_text,
    token_f1,
)
from collegium.training.examples import Example
from collegium.training.gate import Verdicts, judge
from collegium.training.scoring import choice_logprobs, generate
from collegium.training.wording import ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = st.lists(st.integers(3, 250), min_size=1, max_size=9)
NEVER = 0
"""A token that the tiny model never says."""


@dataclass(frozen=True)
class Tiny:
    model: PreTrainedModel
    chat: ChatEncoder
    end: int

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """The plain way: one forward pass over the whole, without a cache or a batch."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0].float()
        table = torch.log_softmax(logits, -1)
        return [float(table[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)]

    def greedy(self, prompt: Sequence[int], tokens: int, end: int) -> list[int]:
        import torch

        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + tokens:
                token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == end:
                    break
                ids.append(token)
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> Tiny:
    import torch

    cached = CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")
    tokenizer = load_tokenizer(cached)
    model = load_lm(cached, device=pick_device("cpu"), dtype=torch.float32)
    return Tiny(model, ChatEncoder(tokenizer), int(tokenizer.eos_token_id))


@given(prompt=TOKENS, choices=st.lists(TOKENS, min_size=1, max_size=4))
@settings(max_examples=25)
def test_likelihoods_are_those_of_a_pass_for_each_choice(
    tiny: Tiny, prompt: list[int], choices: list[list[int]]
) -> None:
    found = choice_logprobs(tiny.model, prompt, choices)
    assert [len(one) for one in found] == [len(choice) for choice in choices]
    for ours, choice in zip(found, choices, strict=True):
        assert ours == pytest.approx(tiny.logprobs(prompt, choice), abs=1e-4)


def test_greedy_answers_in_a_batch_are_those_of_one_by_one(tiny: Tiny) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 40))] for _ in range(7)]
    expected = [tiny.greedy(prompt, 8, NEVER) for prompt in prompts]
    assert generate(tiny.model, prompts, max_tokens=8, end=NEVER, batch_size=3) == expected
    assert generate(tiny.model, prompts, max_tokens=8, end=NEVER) == expected
    assert generate(tiny.model, prompts[:1], max_tokens=8, end=NEVER) == expected[:1]
    assert generate(tiny.model, [], max_tokens=8, end=NEVER) == []


def test_greedy_answers_end_at_the_end_token(tiny: Tiny) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 250) for _ in range(5 + 3 * at)] for at in range(4)]
    end = tiny.greedy(prompts[0], 8, NEVER)[3]
    expected = [tiny.greedy(prompt, 8, end) for prompt in prompts]
    assert len(expected[0]) <= 3
    assert generate(tiny.model, prompts, max_tokens=8, end=end) == expected


@pytest.mark.parametrize("name", [None, "law"])
def test_the_engine_measures_what_torch_does(tiny_base: Path, adapters: Mapping[str, Path], name: str | None) -> None:
    import torch
    from peft import PeftModel

    cached = CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")
    tokenizer = load_tokenizer(cached)
    end = int(tokenizer.eos_token_id)
    model: Any = load_lm(cached, device=pick_device("cpu"), dtype=torch.float32)
    if name:
        model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
    plain = TorchAnswerer(model, end)
    rng = random.Random(2)

    def some(most: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(rng.randrange(1, most))]

    questions = [(some(40), [some(6) for _ in range(rng.randrange(1, 5))]) for _ in range(21)]
    prompts = [prompt for prompt, _ in questions]
    engine = Engine(open_decoder(tiny_base), tokenizer, max_rows=3, max_queue=2)
    try:
        adapter = Adapter(name, adapters[name]) if name else None
        served = EngineAnswerer(engine, lambda prompt: (Row(prompt, adapter),))
        for ours, theirs in zip(served.logprobs(questions), plain.logprobs(questions), strict=True):
            assert [len(one) for one in ours] == [len(one) for one in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one == pytest.approx(other, abs=1e-3)
        assert [*served.generate(prompts, 8)] == [*plain.generate(prompts, 8)]
        assert not [*served.generate([], 8)]
        assert list(served.logprobs([])) == []
        assert engine.stats().running == 0
        with pytest.raises(InvalidRequest):
            list(served.generate([[3], [10_000], [4]], 8))
        until(lambda: is_idle(engine))
    finally:
        engine.close()


def ask_for(prompt: str, answer: str, id_: str, source: str = "wine", choices: tuple[str, ...] = ()) -> Example:
    return Example(prompt, answer, id_, source, "", choices)


@pytest.fixture
def scorer(tiny: Tiny) -> Scorer:
    return Scorer(TorchAnswerer(tiny.model, tiny.end), tiny.chat)


def said(tiny: Tiny, row: Example) -> str:
    """What the model answers when it is asked this row alone."""
    from collegium.training.evaluate import ANSWER_TOKENS

    prompt = tiny.chat.encode([Message("user", ask(row))])
    return tiny.chat.decode(tiny.greedy(prompt, ANSWER_TOKENS, tiny.end))


def test_rows_are_scored_by_what_they_are(tiny: Tiny, scorer: Scorer) -> None:
    right = ask_for("hello", said(tiny, ask_for("hello", "?", "a")), "a")
    wrong = ask_for("hello", "Burgundy", "b")
    choice = ask_for("which", "red", "c", choices=("red", "white", "rosé or so"))
    long = ask_for("explain", "A long answer.", "d", source="medquad")
    told: list[tuple[int, int]] = []
    scores = scorer.score([right, choice, wrong, long], lambda done, of: told.append((done, of)))
    assert scores[0] == {"exact_match": 1.0, "token_f1": 1.0}
    assert scores[2]["exact_match"] == 0.0
    prompt = tiny.chat.encode([Message("user", ask(choice))])
    means = {one: np.mean(tiny.logprobs(prompt, tiny.chat.text(one))) for one in choice.choices}
    assert scores[1] == {"accuracy": float(max(means, key=means.__getitem__) == "red")}
    prompt = tiny.chat.encode([Message("user", "explain")])
    assert scores[3] == {"nll": pytest.approx(-np.mean(tiny.logprobs(prompt, tiny.chat.text("A long answer."))))}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_answers_may_be_compared_as_text_where_likelihoods_are_dear(tiny: Tiny, scorer: Scorer) -> None:
    closed = Example("explain", "red", "a", "boolq", "", ("red", "white"), "A wine.")  # a wording without the choices
    closed = replace(closed, answer=said(tiny, closed))
    wrong = replace(closed, answer="Burgundy")
    long = ask_for("explain", "A long answer.", "d", source="medquad")
    rows = [closed, wrong, long]
    assert replace(scorer, spoken="closed").score(rows)[:2] == [{"accuracy": 1.0}, {"accuracy": 0.0}]
    assert set(replace(scorer, spoken="closed").score(rows)[2]) == {"nll"}
    texts = {tuple(prompt_of(row, tiny.chat)): row.prompt for row in rows}
    speaker = SpokenAnswerer(lambda questions, most: map(tiny.chat.text, questions), texts)
    scores = Scorer(speaker, tiny.chat, "all").score(rows)
    assert scores[:2] == [{"accuracy": 0.0}, {"accuracy": 0.0}]
    assert scores[2] == {"exact_match": 0.0, "token_f1": 0.0}
    with pytest.raises(InvalidRequest, match="no likelihoods"):
        Scorer(speaker, tiny.chat).score(rows)


def test_each_row_is_told_of_as_soon_as_it_is_scored(tiny: Tiny) -> None:
    """Answers that are generated come first."""
    order: list[str] = []

    def say(questions: Sequence[str], most: int) -> Iterator[list[int]]:
        for question in questions:
            order.append(question)
            yield tiny.chat.text(question)

    rows = [ask_for(text, text, str(number)) for number, text in enumerate(("one", "two"))]
    speaker = SpokenAnswerer(say, {tuple(prompt_of(row, tiny.chat)): row.prompt for row in rows})
    scores = Scorer(speaker, tiny.chat, "all").score(rows, lambda done, of: order.append(f"{done} of {of}"))
    assert order == ["one", "1 of 2", "two", "2 of 2"]
    assert [score["exact_match"] for score in scores] == [1.0, 1.0]


def test_one_choice_is_the_likeliest(tiny: Tiny, scorer: Scorer) -> None:
    choices = ("red", "white", "rosé or so")
    scores = scorer.score([ask_for("which", one, one, choices=choices) for one in choices])
    assert sum(score["accuracy"] for score in scores) == 1


def test_rows_of_one_id_are_not_mixed_up(tiny: Tiny, scorer: Scorer) -> None:
    rows = [ask_for(text, said(tiny, ask_for(text, "?", "x")), "test-1") for text in ("hello", "tell me more")]
    assert rows[0].answer != rows[1].answer
    assert [score["exact_match"] for score in scorer.score(rows)] == [1.0, 1.0]


def test_probes_ask_what_nobody_trains_on(scorer: Scorer) -> None:
    from collegium.router.questions import free_questions

    trained = {question for questions in free_questions().values() for question in questions}
    general = probes("no-such-domain")
    for domain in ("general", "law", "health", "science", "code", "finance"):
        asked = {row.prompt for row in probes(domain)}
        assert asked
        assert not asked & trained
    assert general == probes("general") != probes("law")
    scores = by_task(general, scorer.score(general))
    assert set(scores) == {(FREE_QUESTIONS, "in_sentences")}
    assert len(scores[FREE_QUESTIONS, "in_sentences"]) == len(general)


@pytest.mark.parametrize(
    ("answer", "reference", "insensitive", "sensitive"),
    [
        ("Paris", "Paris", True, True),
        ("paris", "Paris", True, False),
        ("STRASSE", "straße", True, False),
        (" Paris.\n", "Paris", True, True),
        ("ls  -l\t*", "ls -l *", True, True),
        ("Paris..", "Paris", False, False),
        ("Paris, France", "Paris", False, False),
        ("", "Paris", False, False),
        ("", "", True, True),
    ],
)
def test_same_text(answer: str, reference: str, insensitive: bool, sensitive: bool) -> None:
    for one, other in ((answer, reference), (reference, answer)):
        assert same_text(one, other, case=False) == insensitive
        assert same_text(one, other, case=True) == sensitive


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("a b", "a b", 1.0),
        ("b a", "a b", 1.0),
        ("a", "a b", 2 / 3),
        ("a a", "a b", 0.5),
        ("c", "a b", 0.0),
        ("", "a b", 0.0),
        ("", "", 0.0),
    ],
)
def test_token_f1(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(st.text("ab ", max_size=9), st.text("ab ", max_size=9))
def test_token_f1_is_a_share_and_takes_no_side(one: str, other: str) -> None:
    f1 = token_f1(one, other)
    assert 0 <= f1 <= 1
    assert f1 == token_f1(other, one)
    assert (f1 == 1) == (sorted(one.split()) == sorted(other.split()) != [])


def test_scores_are_gathered_by_task() -> None:
    rows = [ask_for("?", "x", str(at), source) for at, source in enumerate(("wine", "beer", "wine"))]
    scores = [{"exact_match": 1.0, "token_f1": 1.0}, {"nll": 2.0}, {"exact_match": 0.0, "token_f1": 0.5}]
    assert by_task(rows, scores) == {
        ("wine", "exact_match"): [1.0, 0.0],
        ("wine", "token_f1"): [1.0, 0.5],
        ("beer", "nll"): [2.0],
    }
    assert by_task([], []) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_an_interval_contains_the_mean(values: list[float]) -> None:
    low, high = interval(np.asarray(values), np.random.default_rng(0), 400)
    assert min(values) - 1e-4 <= low <= np.mean(values) + 1e-4
    assert np.mean(values) - 1e-4 <= high <= max(values) + 1e-4


def test_a_score_stands_beside_others() -> None:
    results: Results = {("wine", "nll"): [2.0] * 9, ("beer", "accuracy"): [1.0, 0.0] * 50}
    base: Results = {("wine", "nll"): [3.0] * 9, ("beer", "accuracy"): [0.25] * 100}
    beer, wine = compare(results, base, {"expert alone": results, "tuned directly": base})
    assert wine.beside == {"expert alone": 2.0, "tuned directly": 3.0}
    assert beer.beside == {"expert alone": 0.5, "tuned directly": 0.25}
    assert compare(results, base)[0].beside == {}


def test_a_score_stands_beside_the_base() -> None:
    results: Results = {("wine", "nll"): [2.0] * 9, ("beer", "accuracy"): [1.0, 0.0] * 50}
    base: Results = {("wine", "nll"): [3.0] * 9, ("beer", "accuracy"): [0.25] * 100}
    beer, wine = compare(results, base)
    assert (wine.task, wine.metric, wine.value, wine.low, wine.high, wine.base, wine.rows) == (
        *("wine", "nll", 2.0, 2.0, 2.0, 3.0, 9),
    )
    assert (beer.task, beer.value, beer.base, beer.rows) == ("beer", 0.5, 0.25, 100)
    assert 0.35 < beer.low < 0.5 < beer.high < 0.65
    assert compare(results, base) == (beer, wine)


def one_task(values: Sequence[float], metric: str = "accuracy") -> Results:
    return {("wine", metric): list(values)}


def talking(results: Results, share: float) -> Results:
    return {**results, (FREE_QUESTIONS, "in_sentences"): [1.0] * round(8 * share) + [0.0] * round(8 - 8 * share)}


def test_a_clear_winner_passes() -> None:
    verdict = judge(one_task([1] * 40 + [0] * 10), one_task([0] * 50))
    assert verdict.passed
    assert verdict.gain == pytest.approx(0.8)
    assert 0 < verdict.low < 0.8 < verdict.high < 1
    assert str(verdict).startswith("better: +0.8000")
    assert f"{verdict.low:+.4f} to {verdict.high:+.4f}" in str(verdict)


@pytest.mark.parametrize(
    ("candidate", "base"),
    [
        ([1, 0, 1, 0] * 10, [1, 0, 1, 0] * 10),
        ([0] * 20, [0] * 20),
        ([0] * 40, [1] * 40),
        ([1, 0] * 20, [1] * 40),
        ([1], [0]),
        ([1, 1], [0, 0]),
        ([1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 1]),
        ([1, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_an_equal_a_worse_and_a_lucky_one_are_refused(candidate: list[float], base: list[float]) -> None:
    verdict = judge(one_task(candidate), one_task(base))
    assert not verdict.passed
    assert verdict.low <= verdict.gain == pytest.approx(np.mean(candidate) - np.mean(base))
    assert str(verdict).startswith("not better: ")


def test_who_has_to_beat_several_is_told_who_wins() -> None:
    strong, weak, same = one_task([1] * 30), one_task([0] * 30), one_task([1] * 30)
    both = Verdicts({"the large model alone": judge(strong, weak), "the small expert alone": judge(strong, weak)})
    assert both.passed
    assert str(both).count("better than") == 2
    assert "wins" not in str(both)
    for rival, word, winner in ((same, "; not better than", ""), (one_task([2] * 30), "; worse than", "wins")):
        some = Verdicts({"the large model alone": judge(strong, weak), "the small expert alone": judge(strong, rival)})
        assert not some.passed
        assert f"{word} the small expert alone: " in str(some)
        assert str(some).endswith(f". The small expert alone {winner}") == bool(winner)


def test_a_lower_nll_is_better() -> None:
    low, high = (one_task(np.linspace(start, start + 1, 20).tolist(), "nll") for start in (1, 3))
    assert judge(low, high).passed
    assert judge(low, high).gain == pytest.approx(2)
    assert not judge(high, low).passed


def test_tasks_weigh_the_same_whatever_their_size() -> None:
    candidate: Results = {("large", "accuracy"): [1.0] * 500, ("small", "accuracy"): [0.0] * 20}
    base: Results = {("large", "accuracy"): [0.8] * 500, ("small", "accuracy"): [1.0] * 20}
    verdict = judge(candidate, base)
    assert not verdict.passed
    assert verdict.gain == pytest.approx(-0.4)


def test_a_task_counts_once_by_its_finest_metric() -> None:
    candidate: Results = {("wine", "exact_match"): [0.0] * 30, ("wine", "token_f1"): [0.9] * 30}
    base: Results = {("wine", "exact_match"): [0.0] * 30, ("wine", "token_f1"): [0.1] * 30}
    assert judge(candidate, base).gain == pytest.approx(0.8)
    candidate["wine", "accuracy"] = base["wine", "accuracy"] = [0.5] * 30
    assert judge(candidate, base).gain == 0


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(1, 1, True), (0.75, 1, True), (0.5, 1, False), (0, 0, True)])
def test_who_no_longer_talks_is_refused(ours: float, theirs: float, passed: bool) -> None:
    candidate, base = talking(one_task([1] * 30), ours), talking(one_task([0] * 30), theirs)
    verdict = judge(candidate, base)
    assert verdict.passed == passed
    assert verdict.gain == pytest.approx(1)
    assert ("free questions" in str(verdict)) == (not passed)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
@settings(max_examples=40)
def test_two_never_beat_each_other(pairs: list[tuple[float, float]]) -> None:
    one, other = (one_task(side) for side in zip(*pairs, strict=True))
    assert not judge(one, one).passed
    assert not (judge(one, other).passed and judge(other, one).passed)
    assert judge(one, other) == judge(one, other)
