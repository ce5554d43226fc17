from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.errors import InvalidRequest
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import log_sum_exp
from collegium.experts.engine.mixing import (
    FEATURES,
    SHARE,
    LearnedMixture,
    PosteriorMixture,
    ProbabilityMixture,
    features,
)
from collegium.tests.engine_rows import drawn, row, softmax, three, two, values

learned = st.tuples(*[st.floats(-3, 3)] * len(FEATURES))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[tuple[float, ...], Floats]:
    rows = draw(st.integers(1, 4))
    raw = draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows).filter(lambda one: sum(one) > 0.01))
    logits = draw(hnp.arrays(np.float32, st.tuples(st.just(rows), st.integers(1, 20)), elements=values))
    return tuple(one / sum(raw) for one in raw), logits


@given(mixtures())
def test_a_mixture_is_the_weighted_mean_of_probabilities(case: tuple[tuple[float, ...], Floats]) -> None:
    weights, logits = case
    expected = sum(w * softmax(one) for w, one in zip(weights, logits, strict=True))
    for combined in (ProbabilityMixture(weights)(list(logits)), PosteriorMixture(weights)(list(logits))):
        assert combined.dtype == np.float32
        np.testing.assert_allclose(softmax(combined), expected, rtol=1e-4, atol=0)
        if sum(weight > 0 for weight in weights) > 1:
            assert log_sum_exp(combined) == pytest.approx(0, abs=1e-4)


@given(three, st.integers(0, 2))
def test_all_the_weight_on_one_row_is_that_row(logits: Floats, chosen: int) -> None:
    rows, weights = list(logits), tuple(float(one == chosen) for one in range(3))
    assert ProbabilityMixture(weights)(rows) is rows[chosen]
    posterior = PosteriorMixture(weights)
    for step in range(3):
        assert posterior(rows, [0] * step) is rows[chosen]
    assert posterior.posterior == weights


def test_a_mixture_keeps_what_underflows_and_what_is_forbidden() -> None:
    low, high = row(0, -300, -np.inf, -np.inf), row(0, -300, -200, -np.inf)
    combined = ProbabilityMixture((0.5, 0.5))([low, high])
    np.testing.assert_allclose(combined, [0, -300, -200 - math.log(2), -np.inf], atol=1e-4)
    weighed = ProbabilityMixture((1 - 1e-40, 1e-40))([low, high])
    np.testing.assert_allclose(weighed, [0, -300, -200 + math.log(1e-40), -np.inf], atol=1e-4)


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (1.5, -0.5), (math.nan, 1.0), (math.inf,)])
def test_bad_weights_are_refused(weights: Sequence[float]) -> None:
    for make in (ProbabilityMixture, PosteriorMixture):
        with pytest.raises(InvalidRequest, match="weights are") as caught:
            make(tuple(weights))
        assert caught.value.hint


def by_paths(prior: Sequence[float], probabilities: Sequence[Sequence[float]]) -> list[float]:
    """Who answers next, over all ways in which the answering expert may have changed. `probabilities[t][i]` of token t."""
    found = [0.0] * len(prior)
    for path in product(range(len(prior)), repeat=len(probabilities) + 1):
        weight = prior[path[0]]
        for step, told in enumerate(probabilities):
            stays = (1 - SHARE) * (path[step] == path[step + 1])
            weight *= told[path[step]] * (stays + SHARE * prior[path[step + 1]])
        found[path[-1]] += weight
    return [one / sum(found) for one in found]


def follow(
    mixture: PosteriorMixture, steps: Sequence[Sequence[Floats]], tokens: Sequence[int]
) -> list[tuple[float, ...]]:
    posteriors = []
    for step, rows in enumerate(steps):
        mixture(list(rows), tokens[:step])
        posteriors.append(mixture.posterior)
    return posteriors


@given(st.integers(0, 1000), st.tuples(*[st.floats(0.05, 1)] * 3), st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_the_posterior_is_bayes_rule(seed: int, raw: tuple[float, ...], tokens: list[int]) -> None:
    prior = [one / sum(raw) for one in raw]
    steps = [drawn(10 * seed + step, 3, spread=0.5) for step in range(5)]
    told = [[float(softmax(one)[token]) for one in rows] for rows, token in zip(steps, tokens, strict=False)]
    found = follow(PosteriorMixture(prior), steps, tokens)
    assert found[0] == pytest.approx(prior)
    for step, posterior in enumerate(found):
        assert posterior == pytest.approx(by_paths(prior, told[:step]), rel=1e-4)
    plain = np.array(prior) * np.prod(told, axis=0)  # the best expert never changes
    np.testing.assert_allclose(found[-1], plain / plain.sum(), atol=0.05)


def test_the_mean_follows_the_posterior() -> None:
    mixture, rows = PosteriorMixture((0.5, 0.5)), [row(2, 0), row(0, 2)]
    for step in range(4):
        combined = mixture(rows, [0] * step)
        expected = sum(w * softmax(one) for w, one in zip(mixture.posterior, rows, strict=True))
        np.testing.assert_allclose(np.exp(combined), expected, rtol=1e-5)
    assert mixture.posterior[0] > 0.99


def test_no_expert_is_lost_for_good() -> None:
    sure = [row(0, -50), row(-50, 0)]
    tokens = [0] * 30 + [1] * 3
    found = follow(PosteriorMixture((0.5, 0.5)), [sure] * 33, tokens)
    assert found[30][1] == pytest.approx(SHARE / 2, rel=1e-3)
    assert found[32][1] > 0.999
    never = [row(0, -np.inf), row(-np.inf, 0)]
    assert follow(PosteriorMixture((0.5, 0.5)), [never] * 3, [0, 1])[2][1] > 0.999


def test_a_token_that_no_row_allows_tells_nothing() -> None:
    rows = [row(0, 1, -np.inf), row(1, 0, -np.inf)]
    found = follow(PosteriorMixture((0.3, 0.7)), [rows] * 2, [2])
    assert found[1] == (0.3, 0.7)


def test_a_posterior_is_of_one_answer() -> None:
    rows, mixture = [row(2, 0), row(0, 2)], PosteriorMixture((0.5, 0.5))
    with pytest.raises(InvalidRequest, match="1 tokens, 0 were read"):
        mixture(rows, [0])
    mixture(rows, [])
    mixture(rows, [0])
    for other in ([0], [0, 0, 0]):
        with pytest.raises(InvalidRequest, match="once a token"):
            mixture(rows, other)
    mixture(rows, [])
    assert mixture.posterior == (0.5, 0.5)


@given(two)
def test_features_are_what_they_are_called(logits: Floats) -> None:
    large, tuned = (np.maximum(softmax(one), 1e-300) for one in logits)
    first, second = int(logits[0].argmax()), int(logits[1].argmax())
    expected = [
        1,
        -(large * np.log(large)).sum(),
        -(tuned * np.log(tuned)).sum(),
        np.log(large.max()),
        np.log(tuned.max()),
        first == second,
        max(np.log(large[second]), -30),
        max(np.log(tuned[first]), -30),
    ]
    found = features(*logits)
    assert found.dtype == np.float32
    assert found.shape == (len(FEATURES),)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_features_of_what_is_forbidden_are_finite() -> None:
    found = features(row(0, -np.inf, -np.inf), row(-np.inf, 0, 0))
    np.testing.assert_allclose(found, [1, 0, math.log(2), 0, -math.log(2), 0, -30, -30], atol=1e-6)


@given(two, learned)
def test_a_learned_mixture_is_its_formula(logits: Floats, weights: tuple[float, ...]) -> None:
    large, tuned = logits
    score = float(np.dot(np.array(weights), features(large, tuned)))
    share = 1 / (1 + math.exp(-score))
    combined = LearnedMixture(weights)([large, tuned])
    assert combined.dtype == np.float32
    expected = share * softmax(large) + (1 - share) * softmax(tuned)
    np.testing.assert_allclose(softmax(combined), expected, rtol=1e-3, atol=1e-12)


@given(two)
def test_a_learned_mixture_that_is_sure_is_one_row(logits: Floats) -> None:
    rest = (0.0,) * (len(FEATURES) - 1)
    rows = list(logits)
    assert LearnedMixture((100.0, *rest))(rows) is rows[0]
    assert LearnedMixture((-100.0, *rest))(rows) is rows[1]
    even = LearnedMixture((0.0, *rest))(rows)
    np.testing.assert_array_equal(even, ProbabilityMixture((0.5, 0.5))(rows))


@pytest.mark.parametrize("weights", [(), (1.0,) * (len(FEATURES) + 1), (math.nan,) * len(FEATURES)])
def test_learned_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="weights are") as caught:
        LearnedMixture(weights)
    assert caught.value.hint
    assert FEATURES[-1] in caught.value.hint
