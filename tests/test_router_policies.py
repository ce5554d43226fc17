from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.router.policies.explicit import explicit
from collegium.router.policies.frugal import MARGIN, frugal
from collegium.router.policies.mixture import LEAST, MOST, mixture
from collegium.router.policies.sticky import sticky
from collegium.router.policies.top1 import top1
from collegium.router.policy import BUILT_IN, Live, Offer, Policy, Scores, degraded, policy
from collegium.schema import Decision

SCORES = Scores(np.zeros(2, np.float32), {"law": 0.6, "code": 0.3, "math": 0.1}, ("law", "code"), 0.6, 0.5, "v1")
UNSURE = replace(SCORES, threshold=0.7)
BASE = Offer("base", None, 1.0)
LAW, CODE, MATH = Offer("tort-expert", 0.7, 1.5), Offer("coder", 0.4, 1.5), Offer("adder", 0.9, 1.0)
OFFERS = {"law": LAW, "code": CODE, "math": MATH}
LIVE = Live(OFFERS, BASE, {"law": 0.5, "code": 0.4, "math": 0.2})
DOMAINS = ["law", "code", "math", "health", "tax"]


def live(*domains: str) -> Live:
    """LIVE with the experts of these domains alone."""
    return replace(LIVE, offers={name: OFFERS[name] for name in domains})


def measured(chances: Sequence[float], *, coverage: float = 0.9, threshold: float = 0.0) -> Scores:
    """What a router would measure."""
    probabilities = dict(zip(DOMAINS, (chance / sum(chances) for chance in chances), strict=False))
    chosen: list[str] = []
    for name in sorted(probabilities, key=lambda name: -probabilities[name]):
        chosen.append(name)
        if sum(probabilities[one] for one in chosen) >= coverage:
            break
    best = max(probabilities.values())
    return Scores(np.zeros(2, np.float32), probabilities, tuple(chosen), best, threshold, "v1")


chances = st.lists(st.floats(0.001, 1), min_size=2, max_size=5)
numbers = st.floats(0, 1)
offers = st.builds(
    Offer, st.sampled_from(["one", "two", "three"]), st.none() | numbers, st.floats(0.1, 4, allow_subnormal=False)
)
lives = st.builds(
    Live,
    st.dictionaries(st.sampled_from(DOMAINS), offers),
    st.just(BASE),
    st.dictionaries(st.sampled_from(DOMAINS), numbers),
)
situations = st.builds(
    measured, chances, coverage=st.sampled_from([0.5, 0.9, 0.99]), threshold=st.sampled_from([0, 0.5])
)


@pytest.mark.parametrize(
    ("scores", "live", "expected"),
    [
        (SCORES, LIVE, ("law", "tort-expert", "routed")),
        (SCORES, live("code"), ("law", "base", "no_expert")),
        (UNSURE, LIVE, (None, "base", "unknown_domain")),
        (replace(SCORES, threshold=0.6), LIVE, ("law", "tort-expert", "routed")),
    ],
)
def test_the_likeliest_domain_decides(scores: Scores, live: Live, expected: tuple[str, ...]) -> None:
    decision = top1(scores, live)
    assert (decision.domain, decision.expert, decision.reason) == expected
    assert decision.probabilities == scores.probabilities
    assert decision.prediction_set == scores.prediction_set
    assert (decision.confidence, decision.threshold, decision.router_version) == (0.6, scores.threshold, "v1")
    assert sum(weight for _, weight in decision.candidates) == 1


def test_an_expert_that_is_asked_for_answers() -> None:
    for scores, domain in ((SCORES, "law"), (UNSURE, None)):
        decision = explicit(scores, "coder")
        assert (decision.domain, decision.expert, decision.reason) == (domain, "coder", "explicit")


def test_a_degraded_decision_keeps_what_was_measured() -> None:
    decision = degraded(mixture(SCORES, LIVE), "base")
    assert (decision.domain, decision.candidates, decision.reason) == ("law", (("base", 1.0),), "degraded")
    assert decision.probabilities == SCORES.probabilities


@pytest.mark.parametrize("name", BUILT_IN)
@given(scores=situations, live=lives)
def test_every_policy_chooses_among_those_who_can_answer(name: str, scores: Scores, live: Live) -> None:
    decision = policy(name)(scores, live)
    names, weights = zip(*decision.candidates, strict=True)
    assert set(names) <= {offer.expert for offer in live.offers.values()} | {"base"}
    assert len(set(names)) == len(names)
    assert list(weights) == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    simple = top1(scores, live)
    assert decision.domain == simple.domain
    if decision.reason == "cheaper":
        assert (simple.reason, decision.expert) == ("routed", "base")
    elif decision.reason != "routed":
        assert decision == simple


@given(situations, lives)
def test_a_mixture_is_of_the_possible_domains_by_their_chances(scores: Scores, live: Live) -> None:
    decision = mixture(scores, live)
    if decision.reason != "routed":
        return
    offered = [name for name in scores.prediction_set if name in live.offers]
    kept = sorted(offered, key=lambda name: -scores.probabilities[name])[:MOST]
    shares = {name: scores.probabilities[name] / sum(scores.probabilities[one] for one in kept) for name in kept}
    for name, share in shares.items():
        if share > LEAST + 1e-9:
            assert live.offers[name].expert in dict(decision.candidates)
    assert live.offers[scores.domain].expert in dict(decision.candidates)
    assert len(decision.candidates) <= MOST
    assert all(weight >= LEAST - 1e-9 for _, weight in decision.candidates)


def test_a_mixture_in_numbers() -> None:
    assert [name for name, _ in mixture(SCORES, LIVE).candidates] == ["tort-expert", "coder"]
    assert [weight for _, weight in mixture(SCORES, LIVE).candidates] == pytest.approx([2 / 3, 1 / 3])
    certain = replace(SCORES, prediction_set=("law",))
    assert mixture(certain, LIVE) == top1(certain, LIVE)
    assert mixture(SCORES, live("law", "math")) == top1(SCORES, LIVE)  # math is no longer possible
    assert mixture(SCORES, live("code")) == top1(SCORES, live("code"))  # and code is no second best
    slight = measured([0.9, 0.06, 0.04], coverage=0.99)
    assert mixture(slight, LIVE) == top1(slight, LIVE)
    four = replace(LIVE, offers=OFFERS | {"health": Offer("doctor", None, 1.0)})
    even = mixture(measured([0.25, 0.25, 0.26, 0.24], coverage=0.99), four)
    assert [name for name, _ in even.candidates] == ["adder", "coder", "tort-expert"]


def test_an_expert_for_two_domains_is_one_voice_in_a_mixture() -> None:
    both = replace(LIVE, offers=OFFERS | {"code": replace(CODE, expert="tort-expert")})
    assert mixture(SCORES, both).candidates == (("tort-expert", 1.0),)


@pytest.mark.parametrize(
    ("offer", "baseline", "worth"),
    [
        (LAW, 0.5, True),
        (replace(LAW, score=0.5), 0.5, False),
        (replace(LAW, score=0.3), 0.5, False),
        (replace(LAW, score=0.51), 0.5, False),  # 0.6 * 0.01 for half a token more
        (replace(LAW, score=0.52), 0.5, True),
        (replace(LAW, score=0.52, cost=3.0), 0.5, False),
        (replace(LAW, score=0.501, cost=1.0), 0.5, True),
        (replace(LAW, score=0.49, cost=0.5), 0.5, True),  # a little worse, and half the cost
        (replace(LAW, score=0.4, cost=0.5), 0.5, False),
        (replace(LAW, score=None), 0.5, True),
        (replace(LAW, score=0.1), None, True),
    ],
)
def test_frugal_pays_for_what_was_measured(offer: Offer, baseline: float | None, worth: bool) -> None:
    now = Live({"law": offer}, BASE, {} if baseline is None else {"law": baseline})
    decision = frugal(SCORES, now)
    assert (decision.domain, decision.reason) == ("law", "routed" if worth else "cheaper")
    assert decision.candidates == ((offer.expert if worth else "base", 1.0),)


@given(situations, lives)
def test_frugal_takes_whoever_is_expected_to_be_worth_more(scores: Scores, live: Live) -> None:
    decision = frugal(scores, live)
    offer, baseline = live.offers.get(scores.domain), live.baseline.get(scores.domain)
    if decision.reason not in ("routed", "cheaper") or offer is None or offer.score is None or baseline is None:
        assert decision == top1(scores, live)
        return
    likely = scores.probabilities[scores.domain]
    worth = likely * offer.score + (1 - likely) * baseline - MARGIN * offer.cost
    base = baseline - MARGIN * BASE.cost
    if abs(worth - base) > 1e-9:
        assert decision.expert == (offer.expert if worth > base else "base")


def turns(*each: Scores, decide: Policy = top1, now: Live = LIVE) -> list[Decision]:
    """The decision of every turn of a conversation."""
    start: list[Decision] = []
    return reduce(lambda said, one: [*said, sticky(decide, one, now, said[-1] if said else None)], each, start)


CLEARLY_LAW = measured([0.95, 0.02, 0.02, 0.01])
PERHAPS_CODE = measured([0.33, 0.6, 0.05, 0.02])
CLEARLY_CODE = measured([0.02, 0.95, 0.02, 0.01])
NOTHING = measured([0.3, 0.25, 0.25, 0.2], threshold=0.5)
CLEARLY_HEALTH = measured([0.02, 0.02, 0.01, 0.95])


@pytest.mark.parametrize(
    ("said", "domains", "reasons"),
    [
        ([CLEARLY_LAW, CLEARLY_LAW], ["law", "law"], ["routed", "routed"]),
        ([CLEARLY_LAW, PERHAPS_CODE], ["law", "law"], ["routed", "sticky"]),
        ([CLEARLY_LAW, CLEARLY_CODE], ["law", "code"], ["routed", "routed"]),
        ([CLEARLY_LAW, NOTHING, NOTHING], ["law", "law", "law"], ["routed", "sticky", "sticky"]),
        ([CLEARLY_LAW, NOTHING, CLEARLY_CODE, NOTHING], ["law", "law", "code", "code"], ["routed", "sticky"] * 2),
        ([NOTHING, PERHAPS_CODE], [None, "code"], ["unknown_domain", "routed"]),
        ([CLEARLY_HEALTH, NOTHING], ["health", "health"], ["no_expert", "sticky"]),
        ([CLEARLY_HEALTH, CLEARLY_LAW], ["health", "law"], ["no_expert", "routed"]),
    ],
)
def test_a_conversation_stays_until_it_clearly_turns(
    said: list[Scores], domains: list[str | None], reasons: list[str]
) -> None:
    decisions = turns(*said)
    assert [decision.domain for decision in decisions] == domains
    assert [decision.reason for decision in decisions] == reasons
    for decision, scores in zip(decisions, said, strict=True):
        offer = LIVE.offers.get(decision.domain or "", BASE)
        assert decision.expert == offer.expert
        assert (decision.probabilities, decision.confidence) == (scores.probabilities, scores.confidence)


def test_whoever_answered_goes_on() -> None:
    several = measured([0.6, 0.398, 0.001, 0.001])
    mixed, after = turns(several, NOTHING, decide=mixture)
    assert (after.candidates, after.reason) == (mixed.candidates, "sticky")
    assert len(after.candidates) == 2


def test_a_domain_that_is_not_weighed_any_more_does_not_answer() -> None:
    before = top1(CLEARLY_LAW, LIVE)
    narrowed = replace(NOTHING, probabilities={"code": 0.5, "math": 0.5}, prediction_set=("code", "math"))
    assert sticky(top1, narrowed, LIVE, before) == top1(narrowed, LIVE)


@given(st.lists(situations, min_size=1, max_size=4), lives, st.sampled_from([top1, mixture, frugal]))
def test_only_what_changed_is_called_sticky(said: list[Scores], live: Live, decide: Policy) -> None:
    before = None
    for scores in said:
        plain, now = decide(scores, live), sticky(decide, scores, live, before)
        if now.reason == "sticky":
            assert before is not None
            assert (now.domain, now.candidates) == (before.domain, before.candidates)
            assert now.domain != plain.domain
            assert not scores.known or now.domain in scores.prediction_set
        else:
            assert now == plain
        before = now


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with a policy `never`."""
    about = tmp_path / "collegium_never-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: collegium-never\nVersion: 1.0\n", "utf-8")
    (about / "entry_points.txt").write_text("[collegium.policies]\nnever = collegium_never:never\n", "utf-8")
    (tmp_path / "collegium_never.py").write_text(
        "def never(scores, live):\n    return scores.decide(None, ((live.fallback.expert, 1.0),), 'unknown_domain')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_policy_of_a_package_is_found(plugin: None) -> None:
    assert policy("never")(SCORES, LIVE).candidates == (("base", 1.0),)
    with pytest.raises(InvalidRequest, match=r"no policy 'first'.*frugal, mixture, never, top1"):
        policy("first")


def test_built_in_policies_are_found_by_name() -> None:
    assert [policy(name) for name in BUILT_IN] == [frugal, mixture, top1]
