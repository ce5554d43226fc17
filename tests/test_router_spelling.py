from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.router.head import Floats
from collegium.router.spelling import LONGEST, Forgiving, Spelling, words_of

SPELLING = Spelling({"contract": 2, "contrast": 9, "court": 1, "fever": 3, "never": 4, "cat": 5})


class Letters:
    """Embeds a text as how often it has each letter, and keeps what it was asked."""

    dimension = 26

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Floats:
        self.asked = list(texts)
        counts = np.array([[1e-3 + text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        normalised: Floats = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return normalised


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a contrct", "a contract"),  # dropped
        ("a ocntract", "a contract"),  # swapped
        ("a conntract", "a contract"),  # doubled
        ("a contraxt", "a contract"),  # replaced: the commoner of two words that are one letter away
        ("the COURT", "the COURT"),
        ("caat", "cat"),
        ("cax", "cax"),  # too short to say
        ("contradictory", "contradictory"),  # nothing is near
        ("1 + 1 = 2?", "1 + 1 = 2?"),
    ],
)
def test_a_word_becomes_the_commonest_that_is_one_edit_away(typed: str, meant: str) -> None:
    assert SPELLING.correct(typed) == meant


def test_words_that_were_learned_are_no_errors() -> None:
    known = words_of(["Contrct, contrct and fevre", "a fevr"], least=2)
    assert known == {"contrct"}
    assert Spelling({"contract": 2, "fever": 3}, known).correct("contrct fevre") == "contrct fever"


def test_long_texts_are_left_alone() -> None:
    assert SPELLING.correct("contrct " * LONGEST) == "contrct " * LONGEST


@given(st.text(max_size=80))
def test_only_words_change(text: str) -> None:
    def rest(one: str) -> str:
        return "".join(character for character in one if not (character.isascii() and character.isalpha()))

    assert rest(SPELLING.correct(text)) == rest(text)


def test_a_mistyped_text_is_the_mean_of_both_readings_and_others_are_read_once() -> None:
    letters = Letters()
    found = Forgiving(letters, SPELLING).encode(["a court", "a contrct", "xyz"])
    assert letters.asked == ["a court", "a contrct", "xyz", "a contract"]
    court, typed, xyz, meant = Letters().encode(letters.asked)
    np.testing.assert_allclose(found[[0, 2]], [court, xyz])
    np.testing.assert_allclose(found[1], (typed + meant) / np.linalg.norm(typed + meant), rtol=1e-6)


def test_a_vocabulary_of_word_pieces_knows_how_words_are_written(tmp_path: Path) -> None:
    vocabulary = {"[CLS]": 0, "court": 1, "##ract": 2, "fever": 3}
    body = {"model": {"type": "WordPiece", "vocab": vocabulary}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    found = Spelling.of(tmp_path)
    assert found is not None
    assert found.correct("the cuort has fevr") == "the court has fever"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    assert Spelling.of(tmp_path) is None
    (tmp_path / "tokenizer.json").unlink()
    assert Spelling.of(tmp_path) is None
