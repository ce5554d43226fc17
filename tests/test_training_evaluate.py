"""Likelihoods, greedy answers and scores are what the plain way of computing them gives."""

from __future__ import annotations

import json
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
from collegium.tests.torch_answerer import TorchAnswerer
from collegium.training.measuring.answerer import EngineAnswerer, SpokenAnswerer
from collegium.training.measuring.evaluate import (
    FREE_QUESTIONS,
    SAID_TOKENS,
    Results,
    Scorer,
    by_task,
    compare,
    deep,
    flat,
    interval,
    probes,
    prompt_of,
    same_text,
    token_f1,
)
from collegium.training.measuring.scoring import choice_logprobs, generate
from collegium.training.rows.examples import Example
from collegium.training.rows.wording import ask

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


def said_of(tiny: Tiny, row: Example) -> str:
    """What the model answers when it is asked this row alone."""
    from collegium.training.measuring.evaluate import ANSWER_TOKENS

    prompt = tiny.chat.encode([Message("user", ask(row))])
    return tiny.chat.decode(tiny.greedy(prompt, ANSWER_TOKENS, tiny.end))


def test_rows_are_scored_by_what_they_are(tiny: Tiny, scorer: Scorer) -> None:
    right = ask_for("hello", said_of(tiny, ask_for("hello", "?", "a")), "a")
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


def test_the_turns_before_are_read_and_a_question_may_be_put_otherwise(tiny: Tiny) -> None:
    history = (Message("system", "Be brief."), Message("user", "What is red?"), Message("assistant", "A wine."))
    row = replace(ask_for("And white?", "So is that.", "a"), history=history)
    assert prompt_of(row, tiny.chat) == tiny.chat.encode([*history, Message("user", "And white?")])
    put = prompt_of(row, tiny.chat, lambda question: f"Of wines. {question}")
    assert put == tiny.chat.encode([*history, Message("user", "Of wines. And white?")])
    assert prompt_of(replace(row, history=()), tiny.chat) == tiny.chat.encode([Message("user", "And white?")])


def test_answers_of_some_words_are_compared_in_meaning_too(tiny: Tiny, scorer: Scorer) -> None:
    sentence = "red is a colour of some wines"
    rows = [
        ask_for("hello", sentence, "a"),
        ask_for("hello", "red", "b"),
        ask_for("explain", f"{sentence} " * 40, "c", source="medquad"),
        ask_for("which", sentence, "d", choices=(sentence, "white")),
        *probes("law")[:1],
    ]
    seen: list[tuple[str, str]] = []

    def similar(answers: Sequence[str], references: Sequence[str]) -> list[Mapping[str, float]]:
        seen.extend(zip(answers, references, strict=True))
        return [{"near": float(len(reference))} for reference in references]

    told: list[tuple[int, int]] = []
    scores = replace(scorer, similar=similar).score(rows, lambda done, of: told.append((done, of)))
    assert [set(score) for score in scores] == [
        {"exact_match", "token_f1", "near"},
        {"exact_match", "token_f1"},
        {"nll", "near"},
        {"accuracy"},
        {"in_sentences"},
    ]
    assert told == [(at, 6) for at in range(1, 7)], "the long one is scored twice"
    said = tiny.chat.decode(tiny.greedy(prompt_of(rows[2], tiny.chat), SAID_TOKENS, tiny.end))
    wanted = tiny.chat.decode(tiny.chat.text(rows[2].answer)[:SAID_TOKENS])
    assert seen == [(said_of(tiny, rows[0]), sentence), (said, wanted)]
    assert len(wanted) < len(rows[2].answer)
    plain = scorer.score(rows)
    assert [{key: value for key, value in one.items() if key != "near"} for one in scores] == plain


def test_a_pair_tells_which_is_likelier(tiny: Tiny, scorer: Scorer) -> None:
    pair = replace(ask_for("which", "red", "a"), rejected="white wine")
    other = replace(pair, answer="white wine", rejected="red")
    prompt = prompt_of(pair, tiny.chat)
    red, white = (np.mean(tiny.logprobs(prompt, tiny.chat.text(one))) for one in ("red", "white wine"))
    found = [score["preference"] for score in scorer.score([pair, other])]
    assert found == [float(red > white), float(white > red)]
    assert sum(found) == 1
    assert set(scorer.score([pair])[0]) == {"exact_match", "token_f1", "preference"}


def test_rows_with_choices_tell_how_sure_it_was(tiny: Tiny, scorer: Scorer) -> None:
    choices = ("red", "white", "rosé or so")
    rows = [ask_for("which", one, one, choices=choices) for one in (*choices, "blue")]
    means = np.array([np.mean(tiny.logprobs(prompt_of(rows[0], tiny.chat), tiny.chat.text(one))) for one in choices])
    shares = np.exp(means) / np.exp(means).sum()
    for row, score in zip(rows, replace(scorer, calibrated=True).score(rows), strict=True):
        assert score["confidence"] == pytest.approx(shares.max(), abs=1e-4)
        truth = np.array([one == row.answer for one in choices], float)
        assert score["brier"] == pytest.approx(((shares - truth) ** 2).sum(), abs=1e-3)
        assert score["accuracy"] == float(choices[int(shares.argmax())] == row.answer)


@given(st.dictionaries(st.tuples(st.text(), st.text()), st.lists(st.floats(allow_nan=False))))
def test_results_are_read_back_as_they_were(results: Results) -> None:
    assert deep(json.loads(json.dumps(flat(results)))) == results


def test_answers_may_be_compared_as_text_where_likelihoods_are_dear(tiny: Tiny, scorer: Scorer) -> None:
    closed = Example("explain", "red", "a", "boolq", "", ("red", "white"), "A wine.")  # a wording without the choices
    closed = replace(closed, answer=said_of(tiny, closed))
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
    rows = [ask_for(text, said_of(tiny, ask_for(text, "?", "x")), "test-1") for text in ("hello", "tell me more")]
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
