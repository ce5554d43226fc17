from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import Identity
from collegium.experts.engine.mixing import ProbabilityMixture
from collegium.experts.engine.steering import LogitArithmetic
from collegium.experts.engine.tail import LEAST_TAIL, WithTail, completed, total_variation
from collegium.tests.engine_rows import drawn, likeliest, row, softmax

LOW = -np.inf


@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.1, 8), st.floats(0.1, 8))
@example(26, 16, 8.0, 1.0)
def test_what_is_guessed_sums_to_what_was_not_told(seed: int, told: int, spread: float, wide: float) -> None:
    (large,), (prior,) = drawn(seed, 1, 60, spread), drawn(seed + 1, 1, 60, wide)
    known = likeliest(large, told)
    seen = known > LOW
    found = completed(known, prior)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[seen], known[seen])
    raised = np.exp(found.astype(np.float64))
    mass = 1 - np.exp(known.astype(np.float64)).sum()
    assert raised[~seen].sum() == pytest.approx(max(mass, LEAST_TAIL), rel=1e-3)
    least = known[seen].min()
    if math.exp(least) * (~seen).sum() > max(mass, LEAST_TAIL):  # else nothing is capped
        assert found[~seen].max() <= least
    below = ~seen & (found < known[seen].min() - 1e-4)  # in proportion to the prior, where not capped
    if below.any():
        assert np.ptp((found - prior)[below]) < 1e-3


def test_the_prior_shapes_the_tail() -> None:
    known = row(math.log(0.6), math.log(0.3), LOW, LOW)
    np.testing.assert_allclose(np.exp(completed(known, row(9, 9, math.log(3), 0))), [0.6, 0.3, 0.075, 0.025], rtol=1e-5)
    capped = row(math.log(0.8), math.log(0.06), LOW, LOW, LOW, LOW)
    expected = [0.8, 0.06, 0.06, 0.04, 0.02, 0.02]
    np.testing.assert_allclose(np.exp(completed(capped, row(0, 0, 9, math.log(2), 0, 0))), expected, rtol=1e-5)


def test_a_prior_that_knows_nothing_spreads_evenly() -> None:
    known = row(math.log(0.7), LOW, LOW, LOW)
    for prior in (row(0, 1, 1, 1), row(0, LOW, LOW, LOW), row(LOW, LOW, LOW, LOW)):
        np.testing.assert_allclose(np.exp(completed(known, prior)), [0.7, 0.1, 0.1, 0.1], rtol=1e-5)


def test_those_told_need_not_be_the_likeliest() -> None:
    known = row(math.log(0.5), math.log(1e-9), LOW, LOW)
    np.testing.assert_allclose(np.exp(completed(known, row(0, 0, math.log(4), 0))), [0.5, 1e-9, 0.4, 0.1], rtol=1e-5)


def test_nothing_told_is_the_prior() -> None:
    (prior,) = drawn(3, 1)
    np.testing.assert_allclose(np.exp(completed(np.full(8, LOW, np.float32), prior)), softmax(prior), rtol=1e-5)


def test_more_than_everything_told_leaves_a_little() -> None:
    found = np.exp(completed(row(math.log(0.7), math.log(0.31), LOW, LOW), row(0, 0, 0, 0)))
    np.testing.assert_allclose(found[2:], LEAST_TAIL / 2, rtol=1e-4)


def test_where_all_is_told_nothing_changes() -> None:
    rows = drawn(1, 3)
    assert completed(rows[0], rows[2]) is rows[0]
    plain = LogitArithmetic(0.7)
    np.testing.assert_array_equal(WithTail(plain)(rows), plain(rows))


def test_the_combiner_sees_its_own_rows() -> None:
    large, tuned, untuned = drawn(2, 3)
    known = likeliest(large, 3)
    whole = completed(known, untuned)
    for combiner in (LogitArithmetic(0.7), ProbabilityMixture((0.4, 0.6))):
        wrapped = WithTail(combiner, prior=2)
        assert wrapped.rows == 3
        expected = combiner([whole, tuned, untuned][: combiner.rows])
        np.testing.assert_array_equal(wrapped([known, tuned, untuned]), expected)
    assert WithTail(LogitArithmetic(0.7)).rows == 3
    np.testing.assert_array_equal(WithTail(LogitArithmetic(0))([known, tuned, untuned]), whole)


def test_the_tail_of_the_prior_is_nearer_than_an_even_one() -> None:
    random = np.random.default_rng(0)
    size = 5000
    untuned = (random.standard_normal(size) * 3).astype(np.float32)
    large = (untuned + random.standard_normal(size)).astype(np.float32)
    wrapped, even = WithTail(Identity(), prior=1), np.zeros(size, np.float32)
    errors = []
    for told in (1, 5, 20, 100, 1000):
        known = likeliest(large, told)
        near, far = (total_variation(wrapped([known, prior]), large) for prior in (untuned, even))
        assert near < 0.7 * far
        errors.append(near)
    assert errors == sorted(errors, reverse=True)
    assert total_variation(wrapped([likeliest(large, size), untuned]), large) < 1e-6


@given(st.integers(0, 1000), st.floats(-9, 9))
def test_total_variation_is_a_distance(seed: int, shift: float) -> None:
    first, second, third = drawn(seed, 3)
    shifted: Floats = first + np.float32(shift)
    assert total_variation(first, shifted) == pytest.approx(0, abs=1e-5)
    apart = total_variation(first, second)
    assert 0 < apart < 1
    assert apart == total_variation(second, first)
    assert apart <= total_variation(first, third) + total_variation(third, second) + 1e-9


def test_total_variation_of_what_has_nothing_in_common() -> None:
    assert total_variation(row(0, LOW), row(LOW, 5)) == pytest.approx(1)
    assert total_variation(row(math.log(3), 0), row(0, 0)) == pytest.approx(0.25)
