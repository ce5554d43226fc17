from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.steering import Contrast, LogitArithmetic, Strength
from collegium.tests.engine_rows import row, softmax, three, two

alphas = st.floats(0, 5)


@given(alphas, alphas, st.integers(1, 50))
def test_a_strength_goes_in_a_straight_line(start: float, end: float, fade: int) -> None:
    strength = Strength(start, end, fade)
    assert strength.at(0) == start
    assert strength.at(fade) == strength.at(fade + 100) == end
    for step in range(fade):
        assert strength.at(step) == pytest.approx(start + (end - start) * step / fade)


@given(alphas, st.integers(0, 1000))
def test_a_strength_without_an_end_is_constant(start: float, step: int) -> None:
    assert Strength(start).at(step) == start


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_bad_strength_is_refused(value: float) -> None:
    for make in (LogitArithmetic, Contrast, Strength):
        with pytest.raises(InvalidRequest, match="alpha is") as caught:
            make(value)
        assert caught.value.hint
    with pytest.raises(InvalidRequest, match="alpha_end is"):
        Strength(1, value, 4)


@pytest.mark.parametrize(("end", "fade"), [(0.5, 0), (None, 3), (0.5, -1), (None, -1)])
def test_an_end_needs_a_fade(end: float | None, fade: int) -> None:
    with pytest.raises(InvalidRequest, match="fade is") as caught:
        Strength(1, end, fade)
    assert caught.value.hint


@given(three, alphas)
def test_logit_arithmetic_is_its_formula(logits: Floats, alpha: float) -> None:
    large, tuned, untuned = logits.astype(np.float64)
    combined = LogitArithmetic(alpha)(list(logits))
    assert combined.dtype == np.float32
    np.testing.assert_allclose(combined, large + alpha * (tuned - untuned), rtol=1e-6, atol=1e-5)


@given(three, alphas)
def test_alpha_0_and_a_tuning_without_effect_are_the_large_model(logits: Floats, alpha: float) -> None:
    large, tuned, untuned = logits
    assert LogitArithmetic(0)([large, tuned, untuned]) is large
    np.testing.assert_array_equal(LogitArithmetic(alpha)([large, tuned, tuned]), large)


@given(three)
def test_alpha_1_on_the_untuned_model_is_the_tuned_one(logits: Floats) -> None:
    tuned, untuned, _ = logits
    combined = LogitArithmetic(1)([untuned, tuned, untuned])
    np.testing.assert_allclose(combined, tuned, rtol=0, atol=1e-13)
    assert combined.argmax() == (tuned if (np.abs(tuned) > 1e-6).all() else combined).argmax()


def test_alpha_1_on_the_untuned_model_is_the_tuned_one_to_the_last_bit() -> None:
    random = np.random.default_rng(0)
    for spread in (1e-2, 1.0, 30.0):
        tuned, untuned = (random.standard_normal((2, 10_000)) * spread).astype(np.float32)
        np.testing.assert_array_equal(LogitArithmetic(1)([untuned, tuned, untuned]), tuned)


def test_the_strength_follows_the_answer() -> None:
    rows = [row(0, 0), row(1, 0), row(0, 0)]
    fading = LogitArithmetic(Strength(2, 0, 4))
    found = [float(fading(rows, [0] * step)[0]) for step in range(6)]
    assert found == pytest.approx([2, 1.5, 1, 0.5, 0, 0])
    assert fading(rows, [0] * 4) is rows[0]
    assert LogitArithmetic(0.5) == LogitArithmetic(Strength(0.5)) != fading


def test_what_rows_forbid() -> None:
    low = -np.inf
    large, tuned, untuned = row(0, low, 0, 0, 0, low), row(1, 1, low, 1, low, low), row(3, 3, 3, low, low, low)
    combined = LogitArithmetic(1)([large, tuned, untuned])
    np.testing.assert_array_equal(combined, row(-2, low, low, 0, low, low))


@given(two, st.floats(0.01, 3), st.floats(0.01, 1))
def test_contrast_is_its_formula(logits: Floats, beta: float, plausibility: float) -> None:
    large, untuned = logits
    combined = Contrast(beta, plausibility)([large, untuned])
    ratio = softmax(large) / softmax(large).max()
    assert np.isfinite(combined[ratio > plausibility * 1.001]).all()
    assert (combined[ratio < plausibility * 0.999] == -np.inf).all()
    kept = np.isfinite(combined)
    assert kept[large.argmax()]
    np.testing.assert_allclose(
        combined[kept], (1 + beta) * large.astype(np.float64)[kept] - beta * untuned[kept], rtol=1e-5, atol=1e-4
    )


def test_contrast_takes_what_the_large_model_says_more() -> None:
    large, untuned = row(2, 1.9, 0, -9), row(2, 0, 0, -20)
    assert Contrast(0)([large, untuned]) is large
    assert Contrast(0.5)([large, untuned]).argmax() == 1
    assert Contrast(Strength(0.5, 0, 1))([large, untuned], [7]) is large
    assert Contrast(5)([large, untuned])[3] == -np.inf  # however much less the small one likes it
    assert Contrast(1)([large, row(2, -np.inf, 0, 0)])[1] == pytest.approx(1.9)


@pytest.mark.parametrize("plausibility", [0, -0.5, 1.1, math.nan])
def test_a_bad_plausibility_is_refused(plausibility: float) -> None:
    with pytest.raises(InvalidRequest, match="plausibility is"):
        Contrast(1, plausibility)
