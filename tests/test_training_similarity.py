"""Answers are compared in meaning by an encoder, and letter by letter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.models.cache import CachedModel
from collegium.models.encoder import Encoder
from collegium.training.measuring.similarity import gestalt, sem_scores, similar_by


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return Encoder(CachedModel("tiny", tiny_encoder, "BertModel", "tiny"))


def test_what_means_the_same_is_near(encoder: Encoder) -> None:
    law, same, code = "the court and the judge", "the judge and the court", "a python function loop bug"
    alike, near, far = sem_scores([law, same, code], [law] * 3, encoder.encode)
    assert alike == pytest.approx(1, abs=1e-5)
    assert far < near <= 1.00001


def test_it_is_the_cosine_of_the_embeddings(encoder: Encoder) -> None:
    one, other = encoder.encode(["a fever"]), encoder.encode(["a tort"])
    assert sem_scores(["a fever"], ["a tort"], encoder.encode) == [pytest.approx(float((one * other).sum()), abs=1e-5)]


def test_who_says_nothing_means_nothing(encoder: Encoder) -> None:
    assert sem_scores(["", " \n", "tort"], ["tort"] * 3, encoder.encode)[:2] == [0.0, 0.0]
    assert sem_scores([], [], lambda texts: pytest.fail("nothing to encode")) == []


@pytest.mark.parametrize(
    ("answer", "reference", "ratio"),
    [
        ("wikimedia", "wikimania", 2 * 7 / 18),  # the example of the measure's own article
        ("abcd", "bcde", 0.75),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("ab", "ab", 1.0),
    ],
)
def test_gestalt(answer: str, reference: str, ratio: float) -> None:
    assert gestalt(answer, reference) == pytest.approx(ratio)


def test_long_texts_are_compared_by_their_frequent_letters_too() -> None:
    text = "the judge of the court " * 30
    assert gestalt(text, text[:-23]) > 0.95


@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
def test_gestalt_is_a_share(one: str, other: str) -> None:
    assert 0 <= gestalt(one, other) <= 1
    assert gestalt(one, one) == 1


def test_both_are_told_of_each_pair() -> None:
    similar = similar_by(lambda texts: np.ones((len(texts), 1), np.float32))
    assert similar(["ab", "ab"], ["ab", "cd"]) == [{"semscore": 1.0, "gestalt": 1.0}, {"semscore": 1.0, "gestalt": 0.0}]
    assert similar([], []) == []
