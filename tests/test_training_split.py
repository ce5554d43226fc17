"""What is measured was not trained on, whatever the order of the rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.training.measuring.gate import FEWEST_ROWS
from collegium.training.rows.examples import Example
from collegium.training.rows.neighbours import plain
from collegium.training.rows.split import split

LEXICON = [a + b + c for a in "bdfgk" for b in "aeiou" for c in ("lmo", "rst", "nd", "ppy", "sh")]


def row(number: int, source: str = "shop", **fields: str) -> Example:
    """A row that is like no other."""
    prompt = " ".join(random.Random(f"{source}{number}").choices(LEXICON, k=9))
    return replace(Example(prompt, "yes", f"{source}-{number}", source), **fields)  # type: ignore[arg-type]


def rows(count: int, source: str = "shop") -> list[Example]:
    return [row(number, source) for number in range(count)]


def ids(side: Sequence[Example]) -> set[str]:
    return {one.id for one in side}


@pytest.mark.parametrize(
    ("count", "limit", "held"),
    [
        (2, 100, 1),
        (3, 100, 1),
        (2 * FEWEST_ROWS - 1, 100, FEWEST_ROWS - 1),
        (2 * FEWEST_ROWS, 100, FEWEST_ROWS),
        (10 * FEWEST_ROWS - 1, 100, FEWEST_ROWS),
        (10 * FEWEST_ROWS + 30, 100, FEWEST_ROWS + 3),
        (20 * FEWEST_ROWS, FEWEST_ROWS + 1, FEWEST_ROWS + 1),
        (60, 3, 3),
    ],
)
def test_a_tenth_is_held_out_and_enough_to_judge(count: int, limit: int, held: int) -> None:
    training, held_out = split(rows(count), test_limit=limit, seed=17)
    assert (len(training), len(held_out)) == (count - held, held)
    assert ids(training) | ids(held_out) == ids(rows(count))


@pytest.mark.parametrize(("given", "limit"), [([], 100), (rows(1), 100), (rows(20), 0)])
def test_too_few_rows_are_refused(given: list[Example], limit: int) -> None:
    with pytest.raises(InvalidRequest, match="One example is too few") as caught:
        split(given, test_limit=limit, seed=17)
    assert caught.value.hint


@pytest.mark.parametrize(
    "given",
    [[row(n, group="one") for n in range(20)], [replace(row(3), id=str(n)) for n in range(20)]],
    ids=["one group", "one question"],
)
def test_rows_that_all_belong_together_cannot_be_split(given: list[Example]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be split") as caught:
        split(given, test_limit=5, seed=17)
    assert "--test" in str(caught.value.hint)


def test_each_source_has_enough_to_be_judged_by() -> None:
    given = rows(60 * FEWEST_ROWS, "large") + rows(2 * FEWEST_ROWS + 1, "small")
    for limit, large, small in (
        (10 * FEWEST_ROWS, 6 * FEWEST_ROWS, FEWEST_ROWS),
        (4 * FEWEST_ROWS, 3 * FEWEST_ROWS, FEWEST_ROWS),
        (6, 3, 3),
    ):
        held_out = split(given, test_limit=limit, seed=17)[1]
        assert Counter(one.source for one in held_out) == {"large": large, "small": small}


def test_each_label_is_held_out_as_often_as_it_is_given() -> None:
    labels = ["refund"] * 160 + ["delivery"] * 80 + ["thanks"] * 60
    given = [row(number, answer=label) for number, label in enumerate(labels)]
    assert Counter(one.answer for one in split(given, test_limit=100, seed=17)[1]) == {
        "refund": 16,
        "delivery": 8,
        "thanks": 6,
    }


def test_the_seed_decides_who_is_held_out() -> None:
    held = [ids(split(rows(100), test_limit=100, seed=seed)[1]) for seed in (1, 1, 2)]
    assert held[0] == held[1] != held[2]


def test_groups_stay_together_whatever_they_say() -> None:
    given = [row(number, group=f"patient {number % 40}") for number in range(200)]
    training, held_out = split(given, test_limit=100, seed=17)
    assert not {one.group for one in training} & {one.group for one in held_out}
    assert len(held_out) == max(20, FEWEST_ROWS)
    # With a group of its own each, even the same question may be on both sides.
    same = [replace(row(3), id=str(number), group=str(number)) for number in range(40)]
    assert len(split(same, test_limit=100, seed=17)[1]) == min(20, FEWEST_ROWS)


def test_rows_of_a_context_and_of_a_question_stay_together() -> None:
    given = [row(number, context=f"Page {number // 5} of the manual.") for number in range(20 * FEWEST_ROWS)]
    training, held_out = split(given, test_limit=100, seed=17)
    assert len(held_out) == 2 * FEWEST_ROWS
    assert not {one.context for one in training} & {one.context for one in held_out}
    given = rows(10 * FEWEST_ROWS)
    again = [replace(one, id=f"{one.id}-again", prompt=f"{one.prompt}?", answer="no") for one in given]
    training, held_out = split(given + again, test_limit=100, seed=17)
    assert len(held_out) == 2 * FEWEST_ROWS
    assert not {one.prompt.rstrip("?") for one in training} & {one.prompt.rstrip("?") for one in held_out}


def test_a_context_that_all_rows_have_does_not_bind_them() -> None:
    given = [row(number, context="You work at a shop.") for number in range(10 * FEWEST_ROWS)]
    assert len(split(given, test_limit=100, seed=17)[1]) == FEWEST_ROWS


def test_large_groups_are_held_out_whole_where_they_fit() -> None:
    given = [row(number, group=f"book {number % 4}") for number in range(120)]
    training, held_out = split(given, test_limit=100, seed=17)
    assert (len(training), len(held_out)) == (90, 30)
    training, held_out = split(given, test_limit=10, seed=17)
    assert (len(training), len(held_out)) == (90, 10)
    assert not {one.group for one in training} & {one.group for one in held_out}


some = st.builds(
    row,
    st.integers(0, 40),
    source=st.sampled_from(["shop", "bar"]),
    context=st.sampled_from(["", "", "a menu", "a bill", "a map"]),
    group=st.sampled_from(["", "", "", "a", "b", "c"]),
    answer=st.sampled_from(["yes", "no", "maybe"]),
)


@settings(deadline=None, max_examples=60)
@given(
    given=st.lists(some, min_size=2, max_size=60), limit=st.integers(1, 20), seed=st.integers(0, 3), order=st.randoms()
)
def test_nothing_is_on_both_sides_in_any_order(
    given: list[Example], limit: int, seed: int, order: random.Random
) -> None:
    given = [replace(one, id=str(number)) for number, one in enumerate(given)]
    shuffled = order.sample(given, len(given))
    try:
        training, held_out = split(given, test_limit=limit, seed=seed)
    except InvalidRequest:
        with pytest.raises(InvalidRequest):
            split(shuffled, test_limit=limit, seed=seed)
        return
    assert split(shuffled, test_limit=limit, seed=seed) == (training, held_out)
    assert 1 <= len(held_out) <= limit
    assert len(training) >= len(given) / 2
    assert not ids(training) & ids(held_out)
    assert not _groups(training) & _groups(held_out)
    if len(_contexts(given)) > 1 or any(one.group for one in given):
        assert not _contexts(training) - {""} & _contexts(held_out)
    assert not _questions(training) & _questions(held_out)
    if len(training) + len(held_out) < len(given):
        assert len(held_out) == limit


def _groups(side: Sequence[Example]) -> set[str]:
    return {one.group for one in side} - {""}


def _contexts(side: Sequence[Example]) -> set[str]:
    return {one.context for one in side if not one.group}


def _questions(side: Sequence[Example]) -> set[tuple[str, str]]:
    return {(plain(one.prompt), one.context) for one in side if not one.group}
