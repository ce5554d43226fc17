from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.errors import InvalidRequest
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import Combiner, Identity, LogitArithmetic, ProbabilityMixture, log_sum_exp

Doubles = npt.NDArray[np.float64]

values = st.floats(-50, 50, width=32)
three = hnp.arrays(np.float32, st.tuples(st.just(3), st.integers(1, 20)), elements=values)
alphas = st.floats(0, 5)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[tuple[float, ...], Floats]:
    rows = draw(st.integers(1, 4))
    raw = draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows).filter(lambda one: sum(one) > 0.01))
    logits = draw(hnp.arrays(np.float32, st.tuples(st.just(rows), st.integers(1, 20)), elements=values))
    return tuple(one / sum(raw) for one in raw), logits


def softmax(logits: npt.ArrayLike) -> Doubles:
    """The textbook's, in double precision."""
    exponents: Doubles = np.exp(np.asarray(logits, np.float64))
    exponents /= exponents.sum()
    return exponents


def test_identity_is_the_row_itself() -> None:
    row = np.arange(4, dtype=np.float32)
    assert Identity()([row]) is row


@given(three, alphas)
def test_logit_arithmetic_is_its_formula(logits: Floats, alpha: float) -> None:
    base, tuned, untuned = logits.astype(np.float64)
    expected = [b + alpha * (t - u) for b, t, u in zip(base, tuned, untuned, strict=True)]
    combined = LogitArithmetic(alpha)(list(logits))
    assert combined.dtype == np.float32
    np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-4)


@given(three, alphas)
def test_alpha_0_and_a_tuning_without_effect_are_the_base(logits: Floats, alpha: float) -> None:
    base, tuned, untuned = logits
    np.testing.assert_array_equal(LogitArithmetic(0)([base, tuned, untuned]), base)
    np.testing.assert_array_equal(LogitArithmetic(alpha)([base, tuned, tuned]), base)


@given(three, alphas, st.tuples(values, values, values))
def test_constants_added_to_rows_change_no_probability(
    logits: Floats, alpha: float, shifts: tuple[float, float, float]
) -> None:
    shifted = logits + np.array(shifts, np.float32)[:, None]
    for combiner in (LogitArithmetic(alpha), ProbabilityMixture((0.2, 0.5, 0.3))):
        here, there = (softmax(combiner(list(rows))) for rows in (logits, shifted))
        np.testing.assert_allclose(here, there, rtol=2e-3, atol=1e-6)
        if len(here) == 1 or np.ptp(np.sort(here)[-2:]) > 0.01:
            assert here.argmax() == there.argmax()


@given(mixtures())
def test_a_mixture_is_the_weighted_mean_of_probabilities(case: tuple[tuple[float, ...], Floats]) -> None:
    weights, logits = case
    expected = sum(w * softmax(row) for w, row in zip(weights, logits, strict=True))
    combined = ProbabilityMixture(weights)(list(logits))
    assert combined.dtype == np.float32
    np.testing.assert_allclose(np.exp(combined.astype(np.float64)), expected, rtol=1e-4, atol=0)
    assert log_sum_exp(combined) == pytest.approx(0, abs=1e-4)


@given(three, st.integers(0, 2))
def test_all_the_weight_on_one_row_is_that_row(logits: Floats, chosen: int) -> None:
    weights = tuple(float(row == chosen) for row in range(3))
    combined = ProbabilityMixture(weights)(list(logits))
    np.testing.assert_allclose(softmax(combined), softmax(logits[chosen]), rtol=1e-4)


def test_a_mixture_keeps_what_underflows_and_what_is_forbidden() -> None:
    low = np.array([0, -300, -np.inf, -np.inf], np.float32)
    high = np.array([0, -300, -200, -np.inf], np.float32)
    combined = ProbabilityMixture((0.5, 0.5))([low, high])
    np.testing.assert_allclose(combined, [0, -300, -200 - math.log(2), -np.inf], atol=1e-4)


@pytest.mark.parametrize("combiner", [Identity(), LogitArithmetic(0.5), ProbabilityMixture((0.25, 0.75))])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_wrong_number_of_rows_is_refused(combiner: Combiner, off: int) -> None:
    row = np.zeros(4, np.float32)
    assert combiner([row] * combiner.rows).shape == (4,)
    with pytest.raises(InvalidRequest, match=f"combines {combiner.rows}"):
        combiner([row] * (combiner.rows + off))


@pytest.mark.parametrize("combiner", [LogitArithmetic(0.5), ProbabilityMixture((0.25, 0.75))])
@pytest.mark.parametrize("size", [1, 5])
def test_rows_of_different_vocabularies_are_refused(combiner: Combiner, size: int) -> None:
    rows = [np.zeros(4, np.float32)] * (combiner.rows - 1)
    with pytest.raises(InvalidRequest, match="vocabularies differ"):
        combiner([*rows, np.zeros(size, np.float32)])


@pytest.mark.parametrize("combiner", [Identity(), LogitArithmetic(0.5), ProbabilityMixture((0.25, 0.75))])
def test_rows_stay_as_they_are(combiner: Combiner) -> None:
    rows = [np.arange(4, dtype=np.float32) * number for number in range(1, combiner.rows + 1)]
    kept = [row.copy() for row in rows]
    for row in rows:
        row.flags.writeable = False
    combiner(rows)
    np.testing.assert_array_equal(rows, kept)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_a_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidRequest, match="alpha is") as caught:
        LogitArithmetic(alpha)
    assert caught.value.hint


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (1.5, -0.5), (math.nan, 1.0), (math.inf,)])
def test_bad_weights_are_refused(weights: Sequence[float]) -> None:
    with pytest.raises(InvalidRequest, match="weights are") as caught:
        ProbabilityMixture(tuple(weights))
    assert caught.value.hint
