from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given

from collegium.errors import InvalidRequest
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import Combiner, Identity, log_sum_exp
from collegium.experts.engine.mixing import FEATURES, LearnedMixture, PosteriorMixture, ProbabilityMixture
from collegium.experts.engine.steering import Contrast, LogitArithmetic, Strength
from collegium.experts.engine.tail import WithTail
from collegium.tests.engine_rows import drawn, row, softmax, three, values

ALL: dict[str, Callable[[], Combiner]] = {
    "identity": Identity,
    "proxy": lambda: LogitArithmetic(0.5),
    "fading": lambda: LogitArithmetic(Strength(0.5, 1.5, 4)),
    "contrast": lambda: Contrast(0.5),
    "mixture": lambda: ProbabilityMixture((0.25, 0.75)),
    "posterior": lambda: PosteriorMixture((0.25, 0.75)),
    "learned": lambda: LearnedMixture((0.1, -0.2, 0.2, 0.3, -0.1, 0.5, 0.1, 0.2)[: len(FEATURES)]),
    "tail": lambda: WithTail(ProbabilityMixture((0.25, 0.75)), prior=2),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
logits_only = pytest.mark.parametrize("make", [make for name, make in ALL.items() if name != "tail"])
several = pytest.mark.parametrize("make", [make for name, make in ALL.items() if name != "identity"])


def test_identity_is_the_row_itself() -> None:
    only = row(0, 1, 2)
    assert Identity()([only]) is only


@every
@pytest.mark.parametrize("off", [-1, 1])
def test_a_wrong_number_of_rows_is_refused(make: Callable[[], Combiner], off: int) -> None:
    combiner, one = make(), np.zeros(4, np.float32)
    assert combiner([one] * combiner.rows, ()).shape == (4,)
    with pytest.raises(InvalidRequest, match=f"combines {combiner.rows}") as caught:
        combiner([one] * (combiner.rows + off), ())
    assert caught.value.hint


@several
@pytest.mark.parametrize("size", [1, 5])
def test_rows_of_different_vocabularies_are_refused(make: Callable[[], Combiner], size: int) -> None:
    combiner = make()
    rows = [np.zeros(4, np.float32)] * (combiner.rows - 1)
    with pytest.raises(InvalidRequest, match="vocabularies differ"):
        combiner([*rows, np.zeros(size, np.float32)], ())


@every
def test_rows_stay_as_they_are(make: Callable[[], Combiner]) -> None:
    combiner = make()
    rows = drawn(1, combiner.rows)
    rows[0][3] = -np.inf
    kept = [one.copy() for one in rows]
    for one in rows:
        one.flags.writeable = False
    for step in range(3):
        combiner(rows, [0] * step)
    np.testing.assert_array_equal(rows, kept)


@logits_only
def test_constants_added_to_rows_change_no_probability(make: Callable[[], Combiner]) -> None:
    here, there = make(), make()
    for step in range(3):
        rows = drawn(step, here.rows)
        shifted = [one + np.float32(7.5 - 20 * place) for place, one in enumerate(rows)]
        expected, found = here(rows, [1] * step), there(shifted, [1] * step)
        np.testing.assert_allclose(softmax(found), softmax(expected), rtol=1e-4, atol=1e-7)


@every
def test_what_is_forbidden_never_becomes_no_number(make: Callable[[], Combiner]) -> None:
    count = make().rows
    for which in product((False, True), repeat=count):
        rows = drawn(5, count)
        for one, holds in zip(rows, which, strict=True):
            one[2 if holds else 4] = -np.inf  # what is forbidden by some, and in another place by the others
        combiner = make()
        for step in range(3):  # the drawn token, too, is one that rows forbid
            combined = combiner(rows, [2, 4][:step])
            assert combined.dtype == np.float32
            assert not np.isnan(combined).any()
            assert not np.isposinf(combined).any()
            assert np.isfinite(combined).any()


@given(three, values)
def test_log_sum_exp_is_what_normalises(logits: Floats, shift: float) -> None:
    one = logits[0]
    assert softmax(one).sum() == pytest.approx(1)
    assert np.exp((one - log_sum_exp(one)).astype(np.float64)).sum() == pytest.approx(1, rel=1e-4)
    assert log_sum_exp(one + np.float32(shift)) == pytest.approx(log_sum_exp(one) + shift, abs=1e-3)


def test_log_sum_exp_of_what_is_forbidden() -> None:
    assert log_sum_exp(row(0, -np.inf, 0)) == pytest.approx(math.log(2))
    assert log_sum_exp(row(-np.inf, -np.inf)) == -math.inf
