"""Examples are put to the model in words: those of their source, or those that fit what they carry."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.training.rows.examples import Example
from collegium.training.rows.wording import Wording, ask, close_labels, known_wordings, wording_of

FIELDS = {"prompt", "context", "choices", "topic"}
ROW = Example("Is it {odd}?", "red", "a-1", "nobody-knows", "odd_or-even", ("red", "blue"), "A {number}.")


class Nth(random.Random):
    """Draws the element at `at`."""

    at = 0

    def choice(self, seq: Any) -> Any:
        return seq[self.at]


def wordings(example: Example) -> Iterator[str]:
    """The example in every one of its wordings."""
    rng = Nth()
    for rng.at in range(len(wording_of(example).wordings)):
        yield ask(example, rng=rng)


def named(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


@pytest.mark.parametrize("source", known_wordings())
def test_every_shipped_wording_formats(source: str) -> None:
    row = replace(ROW, source=source)
    wording = known_wordings()[source]
    asked = list(wordings(row))
    assert wording_of(row) is wording
    assert len(set(asked)) == len(wording.wordings) >= 1
    assert ask(row) == asked[0]
    for template, text in zip(wording.wordings, asked, strict=True):
        assert {"prompt"} <= named(template) <= FIELDS
        assert row.prompt in text
        assert (row.context in text) == ("context" in named(template))
        assert ("red, blue" in text) == ("choices" in named(template))
        assert ("odd or even" in text) == ("topic" in named(template))
        assert text == text.strip()


@pytest.mark.parametrize("source", known_wordings())
def test_every_shipped_source_means_what_it_says(source: str) -> None:
    wording = known_wordings()[source]
    types = get_type_hints(Wording)
    assert wording.labels in get_args(types["labels"])
    assert wording.metric in get_args(types["metric"])
    assert isinstance(wording.case, bool)
    assert len({("context" in named(one)) for one in wording.wordings}) == 1, "the context is needed or it is not"


@pytest.mark.parametrize(
    ("choices", "context", "metric"),
    [
        ((), "", "exact_match"),
        ((), "A number.", "exact_match"),
        (("yes", "no"), "", "accuracy"),
        (("yes", "no"), "A number.", "accuracy"),
    ],
)
def test_unknown_sources_take_a_form_by_what_the_row_carries(
    choices: tuple[str, ...], context: str, metric: str
) -> None:
    row = Example("Is it odd?", "yes", "a-1", "nobody-knows", "topic", choices, context)
    assert wording_of(row).metric == metric
    for text in wordings(row):
        assert "Is it odd?" in text
        assert context in text
        assert ("yes, no" in text) == bool(choices)
        assert "topic" not in text
    if not choices and not context:
        assert list(wordings(row)) == ["Is it odd?"]


def test_wordings_are_drawn_and_the_first_one_measures() -> None:
    row = replace(ROW, source="banking77")
    assert {ask(row, rng=random.Random(seed)) for seed in range(200)} == set(wordings(row))
    assert ask(row, rng=random.Random(3)) == ask(row, rng=random.Random(3))
    assert {ask(row) for _ in range(20)} == {next(wordings(row))}


anything = st.text(alphabet=st.sampled_from("{}0!:.ab \n%$\\"), min_size=1)


@given(prompt=anything, context=anything, choice=anything, source=st.sampled_from(["x", *known_wordings()]))
def test_braces_survive(prompt: str, context: str, choice: str, source: str) -> None:
    row = Example(prompt, choice, "a-1", source, "{topic}", (choice, "{choices}"), context)
    template = wording_of(row).wordings[0]
    text = ask(row)
    assert prompt.strip() in text
    if "context" in named(template):
        assert context.strip() in text
    if "choices" in named(template):
        assert f"{choice}, {{choices}}" in text


def row(source: str, answer: str, topic: str = "", choices: tuple[str, ...] = ()) -> Example:
    return Example("Which?", answer, "a-1", source, topic, choices)


def closed(example: Example, training: Sequence[Example]) -> tuple[str, ...]:
    (one,) = close_labels([example], training)
    assert replace(one, choices=example.choices) == example
    return one.choices


def test_labels_of_a_source_are_those_of_its_training_rows() -> None:
    training = [row("banking77", "refund"), row("banking77", "card"), row("banking77", "card"), row("boolq", "yes")]
    assert closed(row("banking77", "card"), training) == ("card", "refund")
    assert closed(row("banking77", "never trained"), training) == ("card", "refund")
    assert closed(row("banking77", "card"), training[:1]) == ()
    assert closed(row("banking77", "card"), []) == ()


def test_labels_of_a_topic_are_those_of_its_training_rows() -> None:
    training = [row("legalbench", one, topic) for topic in ("hearsay", "torts") for one in (topic, "no")]
    assert closed(row("legalbench", "no", "hearsay"), training) == ("hearsay", "no")
    assert closed(row("legalbench", "no", "torts"), training) == ("no", "torts")
    assert closed(row("legalbench", "no", "contracts"), training) == ()


def test_too_many_labels_are_no_choice() -> None:
    most = known_wordings()["legalbench"].max_labels
    training = [row("legalbench", f"{number:03}", "hearsay") for number in range(most + 1)]
    assert len(closed(row("legalbench", "000", "hearsay"), training[:most])) == most
    assert closed(row("legalbench", "000", "hearsay"), training) == ()


def test_rows_that_have_choices_or_need_none_stay() -> None:
    training = [row(source, one) for source in ("banking77", "nobody-knows", "boolq") for one in ("a", "b")]
    assert closed(row("banking77", "c", choices=("c", "d")), training) == ("c", "d")
    assert closed(row("nobody-knows", "a"), training) == ()
    assert closed(row("boolq", "a"), training) == ()
