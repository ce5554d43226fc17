"""What is fitted is what was planted; what is recorded is what the combiners give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import InvalidRequest
from collegium.experts.combination import formula
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.request import BASE, Request, Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.engine.steering import Strength
from collegium.models.cache import CachedModel
from collegium.models.load import load_tokenizer
from collegium.schema import Combination, Sampling
from collegium.tests.engine_doubles import collect, open_decoder
from collegium.training.measuring.answerer import Rows, run_all
from collegium.training.proxies.fit_combination import fit, fitted_from_dict
from collegium.training.proxies.record_answers import Recorded, Recorder, gather, record

VOCAB, ANSWERS = 50, 40


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[Engine]:
    tokenizer = load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))
    engine = Engine({BASE: open_decoder(tiny_base)}, tokenizer, max_queue=4)
    yield engine
    engine.close()


@dataclass(frozen=True)
class World:
    """Three rows of logits a token, and how the tokens of answers are drawn from them."""

    seed: int = 0
    longest: int = 12

    def recorded(self, truth: Combination) -> Recorded:
        """Answers whose tokens come from the distribution of `truth`."""
        rng = np.random.default_rng(self.seed)
        recorders = []
        for _ in range(ANSWERS):
            answer: list[int] = []
            recorder = Recorder(answer)
            combined = formula(truth)
            for _ in range(int(rng.integers(self.longest // 2, self.longest + 1))):
                rows = {part: rng.normal(0, 2, VOCAB).astype(np.float32) for part in ("large", "tuned", "untuned")}
                rows["tuned"] = rows["untuned"] + rng.normal(0, 3, VOCAB).astype(np.float32)
                logits = combined.combiner([rows[part] for part in combined.parts], answer).astype(np.float64)
                chances = np.exp(logits - logits.max())
                answer.append(int(rng.choice(VOCAB, p=chances / chances.sum())))
                recorder([rows["large"], rows["tuned"], rows["untuned"]], answer[:-1])
            recorders.append(recorder)
        return gather(recorders)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.6])
def test_a_planted_alpha_is_found(alpha: float) -> None:
    fitted = fit(World().recorded(Combination("proxy", alpha)))
    found = fitted.combinations["proxy"]
    assert found.alpha == pytest.approx(alpha, abs=0.2)
    assert fitted.choose("proxy") == found
    assert fitted.nll["proxy"] <= min(fitted.nll["large"], fitted.nll["mixture"]) + 1e-6
    assert fitted.answers == ANSWERS
    assert fitted.tokens == pytest.approx(9 * ANSWERS, rel=0.1)


def test_a_planted_fade_is_found_and_chance_is_not_taken_for_one() -> None:
    world = World(longest=24)
    fading = fit(world.recorded(Combination("proxy", 2.0, 0.2, 16))).combinations["proxy"]
    assert fading.fade
    assert fading.alpha_end is not None
    assert fading.alpha > fading.alpha_end + 0.5
    assert fit(world.recorded(Combination("proxy", 1.0))).combinations["proxy"].fade == 0


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_planted_share_is_found(share: float) -> None:
    fitted = fit(World(longest=40).recorded(Combination("mixture", share)))
    assert fitted.combinations["mixture"].alpha == pytest.approx(share, abs=0.1)
    assert fitted.nll["comblm"] <= fitted.nll["mixture"] + 1e-4


def test_comblm_is_at_least_as_likely_as_the_static_mix_and_says_so_rightly() -> None:
    for seed in range(5):
        recorded = World(seed).recorded(Combination("comblm", 0.0, weights=(0.5, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
        fitted = fit(recorded)
        assert fitted.nll["comblm"] <= fitted.nll["mixture"] + 1e-4


def test_what_is_fitted_survives_as_json() -> None:
    import json

    fitted = fit(World().recorded(Combination("proxy", 1.0)))
    assert fitted_from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted
    assert fitted.choose("contrastive").method == "contrastive"
    formula(fitted.choose("contrastive"))
    close = replace(fitted, nll={"proxy": 2.0, "mixture": 2.1, "comblm": 1.99})
    assert close.choose("best").method == "proxy", "the simpler one"
    assert replace(close, nll={**close.nll, "comblm": 1.9}).choose("best").method == "comblm"
    assert replace(close, nll={**close.nll, "mixture": 1.9}).choose("best").method == "mixture"


def test_answers_weigh_the_same_whatever_their_length() -> None:
    rng = np.random.default_rng(0)
    rows: list[Floats] = [rng.normal(size=VOCAB).astype(np.float32) for _ in range(3)]
    short, long = Recorder([1]), Recorder([2] * 9)
    short(rows, [])
    for step in range(9):
        long(rows, [2] * step)
    recorded = gather([short, long])
    alone = rows[0].astype(np.float64) - np.log(np.exp(rows[0].astype(np.float64)).sum())
    assert recorded.nll(recorded.large) == pytest.approx(-(alone[1] + alone[2]) / 2, abs=1e-5)
    assert recorded.steps.tolist() == [0, *range(9)]


def test_the_engine_records_what_its_combiners_answer(engine: Engine, adapters: Mapping[str, Path]) -> None:
    """By each formula, the likelihood that is read off the record is that of a forced answer."""
    tuned = Adapter("law", adapters["law"])
    answers = [(5, 60, 7, 33), (99,), (41, 12, 8)]
    questions = [([5, 6, 7, at + 10], [answer]) for at, answer in enumerate(answers)]

    def rows(prompt: Sequence[int]) -> Rows:
        return Row(prompt, Adapter("code", adapters["code"])), Row(prompt, tuned), Row(prompt)

    told: list[tuple[int, int]] = []
    recorded = record(engine, rows, questions, lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    fitted = fit(recorded)
    parts = {"large": 0, "tuned": 1, "untuned": 2}
    for combination in (*fitted.combinations.values(), Combination("proxy", 0.7), Combination("proxy", 1.0, 0.0, 2)):
        asked = formula(combination)
        requests = [
            Request(
                tuple(rows(prompt)[parts[part]] for part in asked.parts), formula(combination).combiner, forced=answer
            )
            for prompt, (answer,) in questions
        ]
        means = [
            np.mean([one for delta in deltas for one in delta.logprobs or ()]) for deltas in run_all(engine, requests)
        ]
        if combination.method == "proxy":
            strength = Strength(combination.alpha, combination.alpha_end, combination.fade)
            between = 0.05 if combination.fade else 1e-3
            assert recorded.nll(recorded.steered(strength)) == pytest.approx(-np.mean(means), abs=between)
        else:
            assert fitted.nll[combination.method] == pytest.approx(-np.mean(means), abs=2e-3)


def test_a_large_model_that_is_the_small_one_is_steered_whole(engine: Engine, adapters: Mapping[str, Path]) -> None:
    """Its answers are the tuned model's own, so alpha is about 1."""
    tuned = Adapter("law", adapters["law"])
    prompts = [[5, 6, 7, at] for at in range(10, 30)]
    sampling = Sampling(max_tokens=8, temperature=1.0, min_tokens=8)
    answers = [
        collect(engine.submit(Request((Row(prompt, tuned),), sampling=sampling, seed=at))).tokens
        for at, prompt in enumerate(prompts)
    ]
    questions = [(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]

    def rows(prompt: Sequence[int]) -> Rows:
        return Row(prompt), Row(prompt, tuned), Row(prompt)

    fitted = fit(record(engine, rows, questions))
    assert fitted.combinations["proxy"].alpha == pytest.approx(1, abs=0.2)
    assert fitted.nll["proxy"] <= fitted.nll["tuned"] + 1e-3 < fitted.nll["large"]


def test_nothing_to_fit_on_is_said(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="no answers"):
        record(engine, lambda prompt: (Row(prompt),), [])
