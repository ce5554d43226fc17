"""What would teach an expert nothing, or something wrong, is left out, with its reason, and nothing else is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.schema import Message
from collegium.training.rows.curate import Curated, Dropped, curate, question, summary
from collegium.training.rows.examples import Example
from collegium.training.rows.neighbours import plain, resemblance
from collegium.training.rows.personal import personal

LONG = "The parcel that I ordered from your shop two weeks ago has still not come to my door"


def rows(*said: tuple[str, str], choices: tuple[str, ...] = ()) -> list[Example]:
    return [Example(prompt, answer, f"r{n}", "shop", choices=choices) for n, (prompt, answer) in enumerate(said)]


def dropped(given: Sequence[Example], held_out: Sequence[Example] = ()) -> list[tuple[str, str, str]]:
    return [(one.id, one.why, one.of) for one in curate(given, held_out=held_out).dropped]


def test_sound_rows_stay_as_they_are() -> None:
    sound = rows(
        ("Is tea hot?", "Mostly."), ("Is tea cold?", "Rarely."), ("喝茶吗", "喝 🍵"), ("É à la carte?", "Çà «et» là…")
    )
    assert curate(sound) == Curated(tuple(sound))
    assert curate([]) == Curated(())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("\u200b\ufeff", "empty"),
        ("bell \x07", "malformed"),
        ("lost \ufffd", "malformed"),
        ("half \ud800", "malformed"),
        ("next \x85", "malformed"),
        ("cafÃ©", "malformed"),
        ("the dog\u00e2\u20ac\u2122s tail", "malformed"),
    ],
)
def test_rows_without_a_sound_text_are_left_out(text: str, why: str) -> None:
    assert dropped(rows((text, "yes"))) == [("r0", why, "")]
    assert dropped(rows(("Is it?", text))) == [("r0", why, "")]


def test_a_context_may_be_empty_but_not_broken() -> None:
    (row,) = rows(("Is it?", "yes"))
    assert dropped([replace(row, history=(Message("user", "\x07"),))]) == [("r0", "malformed", "")]
    assert dropped([replace(row, context="a\tb\r\nc")]) == []


def test_rows_that_are_too_long_are_left_out() -> None:
    row = Example("a b", "c", "r0", "shop", context="d e f")
    history = replace(row, id="r1", history=(Message("user", "g"),))
    counted = curate([row, history], count=lambda text: len(text.split()), most_tokens=6)
    assert counted.rows == (row,)
    assert counted.dropped == (Dropped("r1", "shop", "too_long"),)
    assert curate([row, history], count=len).dropped == ()


def test_repeated_rows_are_left_out_but_the_first() -> None:
    given = rows(("Is tea hot?", "Yes."), ("is  TEA hot?\n", "yes."), ("Is tea hot?", "No."), ("Is tea hot?", "Yes."))
    assert dropped(given) == [("r1", "duplicate", "r0"), ("r3", "duplicate", "r0")]


@pytest.mark.parametrize(
    "other",
    [
        {"context": "Iced tea."},
        {"history": (Message("user", "Iced tea, please."),)},
        {"choices": ("Yes.", "Never.")},
        {"answer": "No."},
        {"rejected": "No."},
    ],
)
def test_rows_that_differ_in_anything_said_are_no_duplicates(other: dict[str, object]) -> None:
    (row,) = rows(("Is tea hot?", "Yes."))
    assert dropped([row, replace(row, id="r1", **other)]) == []  # type: ignore[arg-type]


def test_a_topic_tells_questions_apart_where_the_wording_names_it() -> None:
    row = Example("A contract.", "Yes", "r0", "legalbench", topic="survival")
    other = replace(row, id="r1", topic="sharing")
    assert dropped([row, other]) == []
    assert dropped([replace(row, source="shop"), replace(other, source="shop")]) == [("r1", "duplicate", "r0")]


def test_nearly_the_same_question_with_the_same_answer_is_left_out() -> None:
    given = rows((LONG, "late"), (f"{LONG}.", "late"), (f"{LONG}!", "broken"), (LONG.replace("two", "2"), "late"))
    assert dropped(given) == [("r1", "near_duplicate", "r0")]


def test_questions_with_other_numbers_are_other_questions() -> None:
    text = "What should a person with diabetes of type {} eat, and what should be left out of each meal?"
    for one, other in (("1", "2"), ("II", "III"), ("V", "X")):
        assert dropped(rows((text.format(one), "Ask a doctor."), (text.format(other), "Ask a doctor."))) == []
        assert resemblance(plain(text.format(one)), plain(text.format(other))) > 0.9


def test_a_shared_context_makes_no_duplicate() -> None:
    row = Example("Is it warm?", "yes", "r0", "shop", context=LONG * 5)
    assert dropped([row, replace(row, id="r1", prompt="Is it new?")]) == []


def test_what_is_held_out_is_not_trained_on() -> None:
    held_out = [Example(LONG, "late", "h0", "test"), Example("Is tea hot?", "Yes.", "h1", "test")]
    given = rows((f"{LONG}!", "other"), ("is tea hot?", "No."), ("is tea hot?", "No."), ("Is tea cold?", "No."))
    assert dropped(given, held_out) == [("r0", "held_out", "h0"), ("r1", "held_out", "h1"), ("r2", "held_out", "h1")]


def test_of_answers_that_contradict_each_other_the_most_frequent_stays() -> None:
    said = [("Red?", "no"), ("Red?", "yes"), ("red?", "yes"), ("Blue?", "yes"), ("Blue?", "no")]
    assert dropped(rows(*said, choices=("yes", "no"))) == [
        ("r0", "contradiction", "r1"),
        ("r2", "duplicate", "r1"),
        ("r3", "contradiction", ""),
        ("r4", "contradiction", ""),
    ]
    assert {why for _, why, _ in dropped(rows(*said))} == {"duplicate"}


def test_a_closed_set_is_seen_without_its_choices() -> None:
    labels = [(f"Is {n} {'odd' if n % 2 else 'even'}, or is it a colour like {n * n}?", "yes") for n in range(9)]
    given = rows(*labels, ("Is it?", "yes"), ("Is it?", "no"), ("Is it?", "no"))
    assert dropped(given) == [("r9", "contradiction", "r10"), ("r11", "duplicate", "r10")]


def test_pairs_that_say_nothing_or_stand_against_each_other_are_left_out() -> None:
    pair = Example("Is tea hot?", "Mostly.", "r0", "shop", rejected="No!")
    assert dropped([replace(pair, rejected="mostly. ")]) == [("r0", "no_preference", "")]
    turned = replace(pair, id="r1", answer="No!", rejected="Mostly.")
    assert [why for _, why, _ in dropped([pair, turned])] == ["contradiction"] * 2
    assert dropped([pair, turned, replace(pair, id="r2")]) == [
        ("r1", "contradiction", "r0"),
        ("r2", "duplicate", "r0"),
    ]
    assert dropped([pair, replace(pair, id="r1", rejected="Never.")]) == []


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Write to jo.doe+x@example.co.uk.", ["an e-mail address"]),
        ("@jo, at 5@home", []),
        ("Call +44 20 7946 0958 or", ["a phone number"]),
        ("Call (212) 555-0142!", ["a phone number"]),
        ("Call 212-555-0142.", ["a phone number"]),
        ("+1 and 212-555 and 1234567890 and 1.2125550142", []),
        ("Card 4111 1111 1111 1111,", ["a card number"]),
        ("Card 4111-1111-1111-1112", []),
        ("0.4111111111111111 and 0000 0000 0000 0000", []),
        ("IBAN GB82 WEST 1234 5698 7654 32 BANK", ["an IBAN"]),
        ("DE89370400440532013000", ["an IBAN"]),
        ("DE88370400440532013000 and GB82WEST", []),
        ("SSN 123-45-6789", ["a social security number"]),
        ("000-45-6789, 666-45-6789, 123-00-6789, 2024-45-6789", []),
        ("a@b.org, 078-05-1120", ["an e-mail address", "a social security number"]),
    ],
)
def test_personal_data_is_seen(text: str, kinds: list[str]) -> None:
    assert list(personal(text)) == kinds


def test_rows_with_personal_data_stay_and_are_named() -> None:
    given = [Example("Who?", "Jo, jo@example.org", "r0", "shop"), Example("Whose?", "212-555-0142", "r1", "shop")]
    curated = curate(given)
    assert curated.rows == tuple(given)
    assert curated.noted == (Dropped("r0", "shop", "an e-mail address"), Dropped("r1", "shop", "a phone number"))
    assert "jo@" not in json.dumps(curated.report()) + str(summary(curated.report()))


def test_a_report_counts_and_names() -> None:
    given = rows(*[("Is tea hot?", "Yes.")] * 9, ("", "x"), ("Whose?", "jo@example.org"))
    report = curate(given).report()
    assert json.loads(json.dumps(report)) == report
    assert (report["rows"], report["kept"]) == (11, 2)
    assert report["dropped"]["empty"] == {"rows": 1, "examples": [{"id": "r9"}]}
    assert report["dropped"]["duplicate"]["rows"] == 8
    assert summary(report) == [
        "2 of 11 rows are kept.",
        "1 row without a question or an answer: dropped (r9).",
        "8 rows that another row repeats: dropped (r1 as r0, r2 as r0, r3 as r0, r4 as r0, r5 as r0, ...).",
        "1 row with what looks like an e-mail address: kept (r10).",
    ]


vocabulary = st.sampled_from(["tea", "Tea", "hot", "cold", "is", "1", "2", "\x07", "cup of Ceylon", LONG])
texts = st.lists(vocabulary, max_size=4).map(" ".join)
some = st.builds(
    Example,
    prompt=texts,
    answer=st.sampled_from(["yes", "no", "Yes", "", "maybe"]),
    id=st.uuids().map(str),
    source=st.sampled_from(["shop", "bar"]),
    choices=st.sampled_from([(), ("yes", "no", "Yes", "", "maybe")]),
    context=st.sampled_from(["", "a menu"]),
    rejected=st.sampled_from(["", "no"]),
)


@settings(deadline=None, max_examples=50)
@given(given=st.lists(some, max_size=30), held_out=st.lists(some, max_size=3))
def test_what_was_curated_stays_as_it_is(given: list[Example], held_out: list[Example]) -> None:
    once = curate(given, held_out=held_out)
    assert curate(once.rows, held_out=held_out) == Curated(once.rows, (), once.noted)
    assert sorted(row.id for row in given) == sorted([row.id for row in once.rows] + [one.id for one in once.dropped])
    assert [row for row in given if row in once.rows] == list(once.rows)
    assert not {tuple(map(plain, question(row))) for row in once.rows} & {
        tuple(map(plain, question(row))) for row in held_out
    }


def test_near_duplicates_are_found_among_many() -> None:
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lexicon = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(500)]
    given = [Example(" ".join(rng.choices(lexicon, k=20)), "yes", f"r{n}", "shop") for n in range(500)]
    copies = [replace(row, id=f"{row.id}-copy", prompt=f"{row.prompt} now") for row in given[::5]]
    assert dropped([*given, *copies]) == [(copy.id, "near_duplicate", copy.id[:-5]) for copy in copies]
