"""A candidate is measured as it would serve: what the plain way finds, with passages too, what it forgot, and how sure it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ContextTooLong
from collegium.experts.home import Home
from collegium.models.cache import CachedModel
from collegium.models.chat import ChatEncoder
from collegium.models.load import load_lm, load_tokenizer, pick_device
from collegium.schema import Card, Evidence, Lora, Message, card_from_dict, card_to_dict
from collegium.settings import Settings
from collegium.tests.torch_answerer import TorchAnswerer
from collegium.training.measuring.calibration import CLOSED, brier, calibration_error, calibration_scores, chances
from collegium.training.measuring.evaluate import FREE_QUESTIONS, LOWER_IS_BETTER, Results, Scorer, by_task
from collegium.training.measuring.forgetting import GENERAL, general_loss, general_rows, recall
from collegium.training.measuring.gate import decide
from collegium.training.measuring.measure import HEADINGS, Measured, measure, summary
from collegium.training.rows.examples import Example
from collegium.training.rows.wording import ask

CHOICES = ("red", "white", "rosé")
ROWS = [
    *(Example(f"which wine {at}", CHOICES[at % 3], f"c{at}", "wine", choices=CHOICES) for at in range(20)),
    Example("hello", "a river and a mountain and a soup", "s", "talk"),
    Example("and you", "fine", "h", "talk", history=(Message("user", "hello"), Message("assistant", "How are you?"))),
    Example("explain", "the contract of the plaintiff", "l", "medquad", rejected="no"),
]
TOO_LONG = Example("word " * 400, "yes", "t", "talk")


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def exact(tiny_settings: Settings) -> Settings:
    """The settings of a home, with a model that computes as torch does."""
    return tiny_settings.model_copy(update={"precision": "float32", "kv_cache_mb": 16})


@pytest.fixture(scope="module")
def base(exact: Settings) -> CachedModel:
    with Home(exact) as home:
        return home.models.get(exact.base_model)


@pytest.fixture(scope="module", autouse=True)
def few_questions() -> Iterator[None]:
    """Two free questions and some of the probe: a tiny model takes its time for whole sentences."""
    with pytest.MonkeyPatch.context() as patch:
        asked = [Example(text, "", text, FREE_QUESTIONS) for text in ("hello", "explain")]
        patch.setattr("collegium.training.measuring.measure.probes", lambda domain: asked)
        known = (*general_rows()[:6], *general_rows()[-3:])
        patch.setattr("collegium.training.measuring.forgetting.general_rows", lambda: known)
        yield


def quoting(question: str) -> str:
    """Passages for the closed questions alone, and more than fits for one of them."""
    if "which wine" not in question:
        return question
    return f"{'the judge ' * (500 if 'wine 3' in question else 2)}{question}"


@dataclass(frozen=True)
class Told:
    measured: Measured
    stages: set[str]


@pytest.fixture(scope="module")
def told(base: CachedModel, adapters: Mapping[str, Path], exact: Settings) -> Told:
    stages: set[str] = set()
    contest = {"candidate": adapters["law"], "base": None, "live": adapters["code"]}
    rows = [*ROWS, TOO_LONG]
    found = measure("law", rows, base, contest, exact, lambda what, *_: stages.add(what), context=quoting)
    return Told(found, stages)


@pytest.fixture(scope="module")
def plain(base: CachedModel) -> Scorer:
    """The base model by transformers."""
    import torch

    tokenizer = load_tokenizer(base)
    model = load_lm(base, device=pick_device("cpu"), dtype=torch.float32)
    return Scorer(TorchAnswerer(model, int(tokenizer.eos_token_id)), ChatEncoder(tokenizer), calibrated=True)


def assert_near(found: Results, expected: Results) -> None:
    assert set(found) >= set(expected)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=2e-3), key


def test_it_is_what_the_plain_way_finds(told: Told, plain: Scorer) -> None:
    found = told.measured.results
    assert_near(found["base"], by_task(ROWS, plain.score(ROWS)))
    assert set(found) == {"candidate", "base", "live"}
    assert found["candidate"]["medquad", "nll"] != found["base"]["medquad", "nll"] != found["live"]["medquad", "nll"]
    assert {metric for task, metric in found["base"] if task == "medquad"} == {"nll", "preference"}
    assert {metric for task, metric in found["base"] if task == "talk"} == {
        *("exact_match", "token_f1", "semscore", "gestalt")
    }
    assert [len(found["base"]["talk", metric]) for metric in ("token_f1", "semscore", "gestalt")] == [2, 1, 1]
    assert len(found["live"][FREE_QUESTIONS, "in_sentences"]) == 2
    assert told.measured.left_out == 1


def test_rows_are_measured_again_with_passages(told: Told, plain: Scorer) -> None:
    """Those that passages are found for, and fit."""
    found = told.measured.with_context
    quoted = [row for row in ROWS if row.choices and "wine 3" not in ask(row)]
    assert len(quoted) == 19
    assert set(found) == {"candidate", "base"}
    assert_near(found["base"], by_task(quoted, replace(plain, put=quoting, calibrated=False).score(quoted)))
    assert {task for task, _ in found["base"]} == {"wine"}


def test_general_skill_is_what_the_plain_way_finds(told: Told, plain: Scorer) -> None:
    assert_near(told.measured.general["base"], recall(plain.answerer, plain.chat))
    loss = general_loss(told.measured.general["candidate"], told.measured.general["base"])
    ours, theirs = (told.measured.general[who][GENERAL, "nll"] for who in ("candidate", "base"))
    assert loss.nats == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-4)
    assert loss.low <= loss.nats <= loss.high
    assert len(ours) == 6


def test_a_stage_keeps_it_exactly(told: Told) -> None:
    assert Measured.of(json.loads(json.dumps(told.measured.to_dict()))) == told.measured


def test_the_card_has_every_score_beside_base_and_live(told: Told) -> None:
    scores = {(one.task, one.metric): one for one in told.measured.scores()}
    assert len(scores) == len(told.measured.scores())
    assert {("wine", "accuracy"), ("talk", "semscore"), ("medquad", "preference")} <= set(scores)
    assert {(CLOSED, "ece"), (CLOSED, "brier"), (GENERAL, "general_loss"), (GENERAL, "general_accuracy")} <= set(scores)
    assert ("wine", "accuracy_with_context") in scores
    assert not {"confidence", "brier"} & {metric for task, metric in scores if task != CLOSED}
    assert {"nll", "ece", "brier", "general_loss", "nll_with_context"} == LOWER_IS_BETTER
    assert scores[GENERAL, "general_loss"].base == 0
    for (_, metric), score in scores.items():
        assert set(score.beside) == (set() if metric.endswith("with_context") else {"live"}), score
        assert score.low <= score.value <= score.high or metric == "ece"  # which is overrated more in a drawn sample
    card = Card("law", "law", Lora("0" * 64, 4), "b", evidence=Evidence(scores=told.measured.scores()))
    assert card_from_dict(json.loads(json.dumps(card_to_dict(card)))) == card


def test_a_table_of_it_can_be_printed(told: Told) -> None:
    rows = summary(told.measured)
    assert {len(row) for row in rows} == {len(HEADINGS)}
    assert all(isinstance(cell, str) for row in rows for cell in row)
    named = {(row[0], row[1]): dict(zip(HEADINGS, row, strict=True)) for row in rows}
    assert named["wine", "accuracy"]["rows"] == "20"
    assert named["wine", "accuracy"]["live"]
    assert not named["wine", "accuracy_with_context"]["live"]


def test_progress_is_told(told: Told) -> None:
    whom = ("the expert", "the base", "the live expert")
    assert {f"measuring {who}" for who in whom} < told.stages
    assert {"measuring the expert with passages", "testing what the base remembers"} < told.stages


def test_one_that_learnt_nothing_is_refused(
    base: CachedModel, adapters: Mapping[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    """In the precision that serves, and to the last digit: it is the base, whose encoder is not needed for closed answers."""
    from safetensors.torch import load_file, save_file

    idle = Path(shutil.copytree(adapters["law"], tmp_path / "idle"))
    weights = load_file(idle / "adapter_model.safetensors")
    save_file({name: one * ("lora_A" in name) for name, one in weights.items()}, idle / "adapter_model.safetensors")
    settings = tiny_settings.model_copy(update={"encoder": "no-such-encoder"})
    found = measure("law", ROWS[:20], base, {"candidate": idle, "base": None}, settings, silent)
    assert found.results["candidate"] == found.results["base"]
    assert found.with_context == {}
    verdicts = decide(found)
    assert not verdicts.passed
    assert str(verdicts).startswith("not better than the base: +0.0000 a task (95 % interval +0.0000 to +0.0000)")


def test_rows_that_do_not_fit_are_no_measure(base: CachedModel, exact: Settings) -> None:
    with pytest.raises(ContextTooLong, match="None of 1 held-out rows fits"):
        measure("law", [TOO_LONG], base, {"candidate": None, "base": None}, exact, silent)


def test_what_progress_raises_stops_it(base: CachedModel, exact: Settings) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("law", ROWS[:1], base, {"candidate": None, "base": None}, exact, stop)


def test_nobody_trains_on_the_probe() -> None:
    from collegium.router.questions import free_questions
    from collegium.training.measuring.evaluate import probes

    rows = general_rows()
    asked = [row.prompt for row in rows]
    assert len(rows) > 50
    assert len(set(asked)) == len(asked)
    trained = {question for questions in free_questions().values() for question in questions}
    others = {row.prompt for domain in (*free_questions(), "general") for row in probes(domain)}
    assert not {*asked} & (trained | others)
    for row in rows:
        assert row.answer.strip()
        assert not row.choices or (row.answer == row.choices[0] and len(set(row.choices)) == len(row.choices))


def test_calibration_error_by_hand() -> None:
    sure = [at / 20 for at in range(20)]
    right = [float(at % 3 == 0) for at in range(20)]
    pairs = [(at, at + 1) for at in range(0, 20, 2)]
    expected = sum(abs(sum(sure[at] - right[at] for at in pair)) for pair in pairs) / 20
    assert calibration_error(sure, right) == pytest.approx(expected)
    assert calibration_error(sure[::-1], right[::-1]) == pytest.approx(expected), "bins are of those that are as sure"
    assert calibration_error([0.7, 0.9], [1.0, 0.0]) == pytest.approx((0.3 + 0.9) / 2), "a bin each"
    assert calibration_error([1.0] * 30, [1.0] * 30) == 0
    assert calibration_error([1.0] * 30, [0.0] * 30) == 1


@given(st.lists(st.floats(-30, 0), min_size=2, max_size=5), st.integers(0, 4))
def test_chances_sum_to_one_and_brier_is_least_for_the_likeliest(means: list[float], at: int) -> None:
    shares = chances(means)
    assert shares.sum() == pytest.approx(1)
    truth = [place == at % len(means) for place in range(len(means))]
    assert 0 <= brier(shares, truth) <= 2
    best = [place == int(shares.argmax()) for place in range(len(means))]
    assert brier(shares, best) <= brier(shares, truth) + 1e-9
    assert shares[int(np.argmax(means))] == shares.max()


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_the_error_is_a_share(answers: list[tuple[float, bool]]) -> None:
    sure, right = [one for one, _ in answers], [float(one) for _, one in answers]
    assert -1e-9 <= calibration_error(sure, right) <= 1 + 1e-9
    assert calibration_error(sure, right) >= abs(np.mean(sure) - np.mean(right)) - 1e-9


def test_without_choices_nobody_is_calibrated() -> None:
    results: Results = {("talk", "nll"): [1.0]}
    assert calibration_scores({"candidate": results, "base": results}) == []
