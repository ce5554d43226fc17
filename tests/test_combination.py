from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from collegium.errors import InvalidRequest
from collegium.experts.combination import formula, with_tail
from collegium.experts.engine.mixing import FEATURES, LearnedMixture, ProbabilityMixture
from collegium.experts.engine.steering import Contrast, LogitArithmetic, Strength
from collegium.experts.engine.tail import completed
from collegium.schema import Combination
from collegium.tests.engine_rows import drawn, likeliest

WEIGHTS = (0.5,) * len(FEATURES)
CARDS = {
    "proxy": Combination(alpha=0.6),
    "contrastive": Combination("contrastive", 0.5),
    "mixture": Combination("mixture", 0.3),
    "comblm": Combination("comblm", 0.0, weights=WEIGHTS),
}


def test_each_method_has_its_formula() -> None:
    formulas = {name: formula(card) for name, card in CARDS.items()}
    assert formulas["proxy"].parts == ("large", "tuned", "untuned")
    assert formulas["proxy"].combiner == LogitArithmetic(0.6)
    assert formulas["contrastive"].parts == ("large", "untuned")
    assert formulas["contrastive"].combiner == Contrast(0.5)
    assert formulas["mixture"].parts == formulas["comblm"].parts == ("large", "tuned")
    assert formulas["mixture"].combiner == ProbabilityMixture((0.7, 0.3))
    assert formulas["comblm"].combiner == LearnedMixture(WEIGHTS)
    assert all(len(one.parts) == one.combiner.rows for one in formulas.values())


def test_comblm_mixes_a_steered_model_where_its_card_has_an_alpha() -> None:
    asked = formula(replace(CARDS["comblm"], alpha=0.8))
    assert asked.parts == ("large", "tuned", "untuned")
    large, tuned, untuned = drawn(1, 3)
    steered = LogitArithmetic(0.8)([large, tuned, untuned])
    np.testing.assert_array_equal(
        asked.combiner([large, tuned, untuned], ()), LearnedMixture(WEIGHTS)([steered, tuned])
    )


def test_alpha_fades_unless_the_request_says_otherwise() -> None:
    card = Combination(alpha=1.0, alpha_end=0.2, fade=8)
    assert formula(card).combiner == LogitArithmetic(Strength(1.0, 0.2, 8))
    assert formula(card, 0.4).combiner == LogitArithmetic(0.4)


@pytest.mark.parametrize("method", ["proxy", "contrastive", "mixture"])
def test_alpha_0_is_the_large_model(method: str) -> None:
    asked = formula(CARDS[method], 0.0)
    rows = drawn(1, len(asked.parts))
    assert asked.combiner(rows, ()) is rows[0]


@pytest.mark.parametrize(
    ("card", "alpha", "says"),
    [
        (CARDS["proxy"], -1.0, "alpha is"),
        (CARDS["proxy"], math.nan, "alpha is"),
        (replace(CARDS["proxy"], fade=3), None, "fade is"),
        (CARDS["mixture"], 1.5, "alpha is 1.5"),
        (Combination("mixture", 0.5, 0.1, 5), None, "does not fade"),
        (CARDS["comblm"], 0.5, "takes no alpha"),
        (Combination("comblm"), None, "weights are"),
    ],
)
def test_what_makes_no_sense_is_refused(card: Combination, alpha: float | None, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        formula(card, alpha)
    assert caught.value.hint


def test_a_card_with_an_unknown_method_is_refused() -> None:
    outside: Any = "magic"
    with pytest.raises(InvalidRequest, match="No combination is called 'magic'"):
        formula(Combination(outside))


@pytest.mark.parametrize("method", CARDS)
def test_what_a_server_does_not_tell_is_guessed_with_the_untuned_row(method: str) -> None:
    plain = formula(CARDS[method])
    asked = with_tail(plain)
    assert asked.parts[: len(plain.parts)] == plain.parts
    assert asked.combiner.rows == len(asked.parts)
    assert asked.parts.count("untuned") == 1
    large, tuned, untuned = drawn(4, 3)
    rows = {"large": likeliest(large, 3), "tuned": tuned, "untuned": untuned}
    whole = {**rows, "large": completed(rows["large"], untuned)}
    found = asked.combiner([rows[part] for part in asked.parts], ())
    np.testing.assert_array_equal(found, plain.combiner([whole[part] for part in plain.parts], ()))
