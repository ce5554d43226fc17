"""What a fit promises: votes that are shares, sets that cover, thresholds that refuse what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.router.fit import add_class, calibrate, drop_class, fit_head, right_by_source, views
from collegium.router.head import VOTE, Floats, Head, softmax
from collegium.router.neighbours import NEIGHBOURS, SHARPNESS, vote
from collegium.router.openset import OpenSet
from collegium.router.rows import BACKGROUND, Rows

finite = st.floats(-100, 100, width=32)
DOMAINS = ("a", "b", "c")


def rows_of(embeddings: Floats, domains: Sequence[str], sources: Sequence[str] | None = None) -> Rows:
    ids = tuple(map(str, range(len(domains))))
    return Rows(embeddings, tuple(domains), tuple(sources or domains), ids, (None,) * len(domains))


def drawn(rng: np.random.Generator, count: int, *, noise: float = 0.5, names: Sequence[str] = DOMAINS) -> Rows:
    """Normalised prompts of each domain around a place of its own; those of the background are anywhere."""
    domains = [names[number % len(names)] for number in range(count)]
    places = np.eye(8)[[DOMAINS.index(domain) if domain else 7 for domain in domains]]
    places[[not domain for domain in domains]] = 0
    found = places + noise * rng.normal(size=places.shape)
    return rows_of((found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32), domains)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(2, 6), st.just(4)), elements=finite),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=finite),
    st.floats(0.05, 20),
)
def test_probabilities_are_distributions(weights: Floats, embeddings: Floats, temperature: float) -> None:
    names = tuple(f"d{number}" for number in range(len(weights)))
    head = Head(names, weights, np.zeros(len(weights), np.float32), temperature)
    votes = softmax(np.random.default_rng(0).normal(size=(len(embeddings), len(weights))).astype(np.float32))
    found = head.probabilities(embeddings, votes)
    assert found.shape == (len(embeddings), len(weights))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_regression_and_neighbours_have_half_a_say_each() -> None:
    head = Head(("a", "b"), np.array([[1, 0], [0, 1]], np.float32), np.zeros(2, np.float32))
    found = head.probabilities(np.array([[2, 0]], np.float32), np.array([[0.2, 0.8]], np.float32))[0]
    regression = np.exp(2) / (np.exp(2) + 1)
    assert found[0] == pytest.approx((1 - VOTE) * regression + VOTE * 0.2, abs=2e-3)


# What is stored: a few rows on a circle, of two domains and the background.
labels = st.lists(st.sampled_from(["a", "b", BACKGROUND]), min_size=1, max_size=30)


@st.composite
def stored_rows(draw: st.DrawFn) -> Rows:
    domains = draw(labels)
    angles = draw(hnp.arrays(np.float32, len(domains), elements=st.floats(0, 6.25, width=32)))
    sources = draw(st.lists(st.sampled_from(["x", "y"]), min_size=len(domains), max_size=len(domains)))
    return rows_of(np.stack([np.cos(angles), np.sin(angles)], axis=1), domains, sources)


angle = st.floats(0, 6.25, width=32)


def at(*angles: float) -> Floats:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@given(stored_rows(), st.lists(angle, min_size=1, max_size=4))
def test_votes_are_shares(rows: Rows, angles: Sequence[float]) -> None:
    found = vote(rows, at(*angles), ("a", "b"))
    assert found.shares.shape == (len(angles), 2)
    assert (found.shares >= 0).all()
    np.testing.assert_allclose(found.shares.sum(axis=1), 1, atol=1e-5)
    assert ((found.agreement >= 0) & (found.agreement <= 1 + 1e-6)).all()
    assert ((found.nearest >= -1 - 1e-6) & (found.nearest <= 1 + 1e-6)).all()
    known = [index for index, domain in enumerate(rows.domains) if domain]
    for each, nearest, shares in zip(at(*angles), found.nearest, found.shares, strict=True):
        near = np.sort(rows.embeddings @ each)[-NEIGHBOURS:]
        if not known:
            assert (nearest, list(shares)) == (pytest.approx(near[0], abs=1e-5), [0.5, 0.5])
        elif len(rows) <= NEIGHBOURS:
            assert nearest == pytest.approx((rows.embeddings[known] @ each).max(), abs=1e-5)
        else:
            assert near[0] - 1e-5 <= nearest <= near[-1] + 1e-5


@given(stored_rows(), angle, st.randoms(use_true_random=False))
def test_votes_do_not_depend_on_company_or_order(rows: Rows, alone: float, rng: random.Random) -> None:
    shuffled = rng.sample(range(len(rows)), len(rows))
    assume(len(rows) <= NEIGHBOURS)  # which of several that are equally near is among the nearest depends on the order
    other = rows_of(rows.embeddings[shuffled], [rows.domains[i] for i in shuffled], [rows.sources[i] for i in shuffled])
    one = vote(rows, at(alone), ("a", "b"))
    for same in (vote(other, at(alone), ("a", "b")), vote(rows, at(alone, 1.0, 2.0), ("a", "b"))):
        np.testing.assert_allclose(one.shares[0], same.shares[0], atol=1e-4)
        np.testing.assert_allclose(one.agreement[0], same.agreement[0], atol=1e-4)
    turned = vote(rows, at(alone), ("b", "a"))
    np.testing.assert_allclose(one.shares[0], turned.shares[0][::-1], atol=1e-4)


def test_a_vote_by_hand() -> None:
    rows = rows_of(at(0.0, 0.3, 3.0), ["a", "b", BACKGROUND])
    found = vote(rows, at(0.1), ("a", "b"))
    power = np.exp((np.cos([0.1, 0.2, 2.9]) - np.cos(0.1)) / SHARPNESS)
    assert found.shares[0, 0] == pytest.approx(power[0] / power[:2].sum(), abs=1e-4)
    assert found.agreement[0] == pytest.approx(power[0] / power.sum(), abs=1e-4)
    assert found.nearest[0] == pytest.approx(np.cos(0.1), abs=1e-5)


def test_only_the_nearest_vote() -> None:
    near = at(*np.linspace(-0.1, 0.1, NEIGHBOURS))
    rows = rows_of(np.vstack([near, at(*np.linspace(0.5, 0.6, 50))]), ["a"] * NEIGHBOURS + ["b"] * 50)
    assert vote(rows, at(0.0), ("a", "b")).shares[0].tolist() == [1, 0]


def test_prompts_that_a_user_added_speak_with_a_quarter_of_their_voice() -> None:
    many = at(*np.linspace(-0.1, 0.1, 19))
    shipped = rows_of(np.vstack([many, at(0.0)]), ["a"] * 19 + ["b"])
    added = replace(shipped, texts=(None,) * 19 + ("a prompt of my own",))
    loud, quiet = (vote(rows, at(0.0), ("a", "b")).shares[0] for rows in (shipped, added))
    assert quiet[1] / quiet[0] == pytest.approx(loud[1] / loud[0] / 4, rel=1e-4)
    powers = added.voices * np.exp((added.embeddings @ at(0.0)[0] - 1) / SHARPNESS)
    assert quiet[1] == pytest.approx(powers[19] / powers.sum(), abs=1e-4)


def test_domains_and_their_sources_weigh_the_same() -> None:
    domains = ["a"] * 12 + ["b"] * 3 + [BACKGROUND] * 5
    sources = ["x"] * 10 + ["y"] * 2 + ["x"] * 3 + ["z"] * 5
    rows = rows_of(np.zeros((20, 2), np.float32), domains, sources)
    assert rows.weights.mean() == pytest.approx(1)
    sums = {
        key: rows.weights[[pair == key for pair in zip(domains, sources, strict=True)]].sum()
        for key in set(zip(domains, sources, strict=True))
    }
    assert sums[("a", "x")] == pytest.approx(sums[("a", "y")])
    assert sums[("a", "x")] + sums[("a", "y")] == pytest.approx(sums[("b", "x")])
    assert sums[("b", "x")] == pytest.approx(sums[(BACKGROUND, "z")])


def test_a_large_source_does_not_speak_for_its_domain() -> None:
    rng = np.random.default_rng(0)
    places = {("a", "large"): [1, 0, 0], ("a", "small"): [0, 1, 0], ("b", "only"): [0, 0, 1]}
    sizes = {"large": 1000, "small": 20, "only": 500}
    keys = [key for key in places for _ in range(sizes[key[1]])]
    embeddings = np.array([places[key] for key in keys], np.float32)
    embeddings += 0.05 * rng.normal(size=embeddings.shape).astype(np.float32)
    head = fit_head(rows_of(embeddings, [domain for domain, _ in keys], [source for _, source in keys]))
    large, small = softmax(head.logits(np.array([[1, 0, 0], [0, 1, 0]], np.float32)))[:, 0]
    assert large == pytest.approx(small, abs=0.02)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", BACKGROUND), DOMAINS, (*DOMAINS, BACKGROUND)])
def test_a_head_knows_its_domains_and_not_the_background(names: tuple[str, ...]) -> None:
    rows = drawn(np.random.default_rng(0), 400, noise=0.1, names=names)
    head = fit_head(rows)
    assert head.domains == tuple(name for name in names if name)
    logits = head.logits(rows.embeddings)
    places = rows.places(head.domains)
    known = places >= 0
    assert (logits[known].argmax(axis=1) == places[known]).mean() > 0.99
    if BACKGROUND in names:
        assert logits[~known].max(axis=1).mean() < logits[known].max(axis=1).mean() - 1


def test_the_background_makes_strange_prompts_small() -> None:
    rng = np.random.default_rng(0)
    rows = drawn(rng, 800, noise=0.2, names=(*DOMAINS, BACKGROUND))
    known = rows.where(bool)
    strange = drawn(rng, 100, noise=0.2, names=(BACKGROUND,)).embeddings
    with_it, without = (fit_head(one).logits(strange).max(axis=1).mean() for one in (rows, known))
    assert with_it < without


def test_an_added_class_is_told_apart_and_the_others_stay() -> None:
    rng = np.random.default_rng(1)
    rows = drawn(rng, 600, noise=0.2, names=(*DOMAINS, BACKGROUND))
    before = fit_head(rows.where(lambda domain: domain != "b"))
    after = add_class(before, rows, "b")
    assert after.domains == DOMAINS
    np.testing.assert_array_equal(after.weights[[0, 2]], before.weights)
    np.testing.assert_array_equal(after.bias[[0, 2]], before.bias)
    fresh = drawn(rng, 300, noise=0.2)
    right = after.logits(fresh.embeddings).argmax(axis=1) == fresh.places(DOMAINS)
    assert right.mean() > 0.95
    gone = drop_class(after, "b")
    assert gone.domains == before.domains
    np.testing.assert_array_equal(gone.weights, before.weights)


def test_an_added_class_is_at_the_optimum() -> None:
    """The loss as the docstring writes it, over all domains, is smallest in the weights that are found."""
    rows = drawn(np.random.default_rng(2), 90, noise=0.4)
    before = replace(fit_head(rows.where(lambda domain: domain != "c")), temperature=2.0)
    after = add_class(before, rows, "c")
    assert after.temperature == 2.0
    places, share = rows.places(DOMAINS), rows.weights / len(rows)

    def loss(change: Floats) -> float:
        weights = after.weights.astype(np.float64).copy()
        weights[2] += change
        chances = softmax((rows.embeddings @ weights.T + after.bias).astype(np.float32))
        likelihood = share @ np.log(chances[np.arange(len(rows)), places])
        return float(-likelihood + weights[2] @ weights[2] / (2 * len(rows)))

    best = loss(np.zeros(8, np.float32))
    rng = np.random.default_rng(3)
    for _ in range(20):
        assert loss((0.05 * rng.normal(size=8)).astype(np.float32)) > best


def right_chances(head: Head, stored: Rows, asked: Rows) -> Floats:
    chances = head.probabilities(asked.embeddings, vote(stored, asked.embeddings, head.domains).shares)
    found: Floats = chances[np.arange(len(asked)), asked.places(head.domains)]
    return found


@pytest.fixture(scope="module")
def fitted() -> tuple[Head, OpenSet, Rows]:
    rng = np.random.default_rng(0)
    stored, held_out = drawn(rng, 300, names=(*DOMAINS, BACKGROUND)), drawn(rng, 1500)
    return *calibrate(fit_head(stored), stored, held_out), stored


def test_a_calibrated_head_is_as_sure_as_it_is_right(fitted: tuple[Head, OpenSet, Rows]) -> None:
    head, _, stored = fitted
    fresh = drawn(np.random.default_rng(1), 3000)
    chances = head.probabilities(fresh.embeddings, vote(stored, fresh.embeddings, head.domains).shares)
    right = chances.argmax(axis=1) == fresh.places(head.domains)
    assert chances.max(axis=1).mean() == pytest.approx(right.mean(), abs=0.03)
    assert 0.6 < right.mean() < 0.99, "too easy or too hard to say anything"


def test_the_temperature_is_the_likeliest(fitted: tuple[Head, OpenSet, Rows]) -> None:
    _, _, stored = fitted
    held_out = drawn(np.random.default_rng(4), 600)
    best, _ = calibrate(fit_head(stored), stored, held_out)
    scores = [
        np.log(right_chances(replace(best, temperature=best.temperature * factor), stored, held_out)).mean()
        for factor in (0.9, 1.0, 1.1)
    ]
    assert scores[1] == max(scores)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_prediction_sets_cover_as_stated(coverage: float) -> None:
    rng = np.random.default_rng(5)
    stored = drawn(rng, 300, noise=0.7, names=(*DOMAINS, BACKGROUND))
    head, _ = calibrate(replace(fit_head(stored), coverage=coverage), stored, drawn(rng, 2000, noise=0.7))
    fresh = drawn(rng, 4000, noise=0.7)
    chances = head.probabilities(fresh.embeddings, vote(stored, fresh.embeddings, head.domains).shares)
    sets = [head.prediction_set(dict(zip(head.domains, map(float, row), strict=True))) for row in chances]
    covered = np.mean([domain in chosen for domain, chosen in zip(fresh.domains, sets, strict=True)])
    assert coverage - 0.02 <= covered <= coverage + 0.07  # the likeliest is always in, which adds some
    by_least = (right_chances(head, stored, fresh) >= head.least).mean()
    assert by_least == pytest.approx(coverage, abs=0.025)
    assert 1 < np.mean([len(chosen) for chosen in sets]) < len(DOMAINS), "sets of one or of all say nothing"


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_threshold_refuses_the_stated_share(fitted: tuple[Head, OpenSet, Rows], share: float) -> None:
    head, open_set, stored = fitted
    fresh = drawn(np.random.default_rng(6), 4000)
    seen = views(head, vote(stored, fresh.embeddings, head.domains), fresh.embeddings)
    assert (open_set.p_values(seen) < share).mean() == pytest.approx(share, abs=0.02)
    strange = drawn(np.random.default_rng(7), 1000, names=(BACKGROUND,))
    unseen = views(head, vote(stored, strange.embeddings, head.domains), strange.embeddings)
    assert (open_set.p_values(unseen) < share).mean() > 2 * share


@pytest.mark.parametrize("count", [30, 100])
def test_few_held_out_prompts_refuse_the_stated_share_on_average(count: int) -> None:
    """Over many fits on exchangeable draws: one fit alone may be lucky."""
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(400):
        found = OpenSet.fit(rng.normal(size=(count, 3)).astype(np.float32), np.ones(count, np.float32))
        refused.append((found.p_values(rng.normal(size=(100, 3)).astype(np.float32)) < 0.05).mean())
    assert np.mean(refused) == pytest.approx(0.05, abs=0.012)


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 40), st.just(3)), elements=finite), st.data())
def test_p_values_rise_with_familiarity(held_out: Floats, data: st.DataObject) -> None:
    weights = data.draw(hnp.arrays(np.float32, len(held_out), elements=st.floats(0.125, 8, width=32)))
    found = OpenSet.fit(held_out, weights)
    asked = data.draw(hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3)), elements=finite))
    p_values = found.p_values(asked)
    assert ((p_values >= 0) & (p_values <= 1)).all()
    more = data.draw(hnp.arrays(np.float32, asked.shape, elements=st.floats(0, 50, width=32)))
    assert (found.p_values(asked + more) >= p_values - 1e-5).all()
    again = OpenSet.from_dict(found.to_dict())
    np.testing.assert_array_equal(again.p_values(asked), p_values)


def test_large_sources_do_not_set_the_threshold() -> None:
    rng = np.random.default_rng(0)
    views_ = rng.normal(size=(1100, 3)).astype(np.float32)
    views_[1000:] -= 4  # a small source, as much less familiar
    rows = rows_of(views_, ["a"] * 1100, ["large"] * 1000 + ["small"] * 100)
    found = OpenSet.fit(views_, rows.weights)
    refused = found.p_values(views_) < 0.25
    assert refused[1000:].mean() == pytest.approx(0.5, abs=0.05)
    assert refused[:1000].mean() < 0.05


def test_accuracy_is_told_by_source() -> None:
    rows = rows_of(np.zeros((5, 1), np.float32), ["a", "a", "a", "b", "b"], ["x", "x", "y", "x", "x"])
    found = right_by_source(["a", "b", "a", "b", "b"], rows)
    assert found == {"a/x": 0.5, "a/y": 1.0, "b/x": 1.0, "mean": pytest.approx(2.5 / 3, abs=1e-4)}
