from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.errors import CollegiumError, InvalidRequest
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.distribution import BLOCK, distribution, pick
from collegium.experts.engine.sampling import Mask, Sampler, Token, one_of
from collegium.schema import Sampling

END = 0
GREEDY = Sampling()
WARM = Sampling(temperature=1.0)

# A coarse grid, so that equal logits are common and different ones are told apart in any precision.
grid = st.integers(-80, 80).map(lambda number: number / 8)
vocabularies = hnp.arrays(np.float32, st.integers(2, 40), elements=grid)
temperatures = st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.9])
top_ps = st.sampled_from([1.0, 0.0, 0.0371, 0.37, 0.71, 0.913, 0.98317])  # never a sum of simple fractions
min_ps = st.sampled_from([0.0, 0.0113, 0.217, 0.83, 1.0])
filters = st.builds(Sampling, temperature=temperatures, top_k=st.integers(0, 50), top_p=top_ps, min_p=min_ps)


def logits_of(seed: int, size: int = 1000, spread: float = 3) -> Floats:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def draw(
    logits: Floats, sampling: Sampling = GREEDY, seed: int | None = 1, masks: Sequence[Mask] = (), prompt: Any = ()
) -> Token:
    return Sampler(sampling, prompt, END, seed, masks).draw(logits)


def transformers_probabilities(logits: Floats, sampling: Sampling) -> Floats:
    """What `generate` would draw from with these settings, in double precision."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = torch.tensor(logits[None].astype(np.float64))
    scores = LogitsProcessorList(warpers)(torch.zeros((1, 0), dtype=torch.long), scores)  # type: ignore[arg-type]
    return scores.softmax(-1)[0].numpy()


@given(vocabularies, filters)
@example(np.zeros(40, np.float32), Sampling(temperature=1.0, top_p=0.37))
@example(np.zeros(2, np.float32), Sampling(temperature=1.0, top_p=0.5))
@example(np.zeros(40, np.float32), Sampling(temperature=1.0, top_p=0.0))
def test_the_distribution_is_that_of_transformers(logits: Floats, sampling: Sampling) -> None:
    expected = transformers_probabilities(logits, sampling)
    found = distribution(logits, sampling)
    assert found.dtype == np.float32
    # Which of equal logits top-p keeps is arbitrary in transformers, how many is not.
    found, expected = (one[np.lexsort((one, logits))] for one in (found, expected))
    np.testing.assert_array_equal(found > 0, expected.astype(np.float32) > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("spread", [0.01, 3, 30])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.0, top_k=50),
        Sampling(temperature=1.3, top_k=200, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.05),
        Sampling(temperature=0.02, top_k=9, top_p=0.99, min_p=0.001),
    ],
)
def test_the_distribution_of_a_whole_vocabulary_is_that_of_transformers(sampling: Sampling, spread: float) -> None:
    logits = logits_of(3, 49_152, spread)
    expected = transformers_probabilities(logits, sampling)
    np.testing.assert_allclose(distribution(logits, sampling), expected, rtol=1e-3, atol=1e-7)


@given(vocabularies, st.lists(st.integers(1, 5), max_size=8), st.sampled_from([0.7, 1.1, 2.0]), st.integers(1, 3))
def test_the_repetition_penalty_is_that_of_transformers(
    logits: Floats, prompt: list[int], penalty: float, steps: int
) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    assume(len(logits) > 5)
    process: Any = RepetitionPenaltyLogitsProcessor(penalty)
    sampler = Sampler(Sampling(repetition_penalty=penalty), prompt, END, None)
    generated: list[int] = []
    for _ in range(steps):
        ids = torch.tensor([prompt + generated], dtype=torch.long)
        expected = process(ids, torch.tensor(logits[None]))[0].numpy()
        generated.append(sampler.draw(logits).id)
        assert generated[-1] == expected.argmax()


def test_presence_and_frequency_weigh_the_answer_alone() -> None:
    logits = np.array([-9, 3.0, 2.4, 0.0], np.float32)

    def answer(sampling: Sampling) -> list[int]:
        sampler = Sampler(sampling, [1, 1, 1, 1, 2], END, None)
        return [sampler.draw(logits).id for _ in range(6)]

    assert answer(GREEDY) == [1] * 6
    assert answer(Sampling(presence_penalty=1.0)) == [1, 2, 1, 1, 1, 1]  # once paid, no matter how often
    assert answer(Sampling(frequency_penalty=0.5)) == [1, 1, 2, 1, 2, 1]  # 3.0 2.5 | 2.4 | 2.0 | 1.9 | 1.5
    assert answer(Sampling(presence_penalty=-2.0)) == [1] * 6
    assert answer(Sampling(presence_penalty=1.0, frequency_penalty=0.5)) == [1, 2, 1, 1, 2, 1]


def test_the_answer_does_not_end_before_it_may() -> None:
    logits = np.array([5, 1, 0], np.float32)
    sampler = Sampler(Sampling(min_tokens=2), [], END, None)
    assert [sampler.draw(logits).id for _ in range(3)] == [1, 1, END]


@pytest.mark.parametrize("temperature", [0.0, 0.009])
@given(logits=vocabularies, seed=st.integers())
def test_cold_is_greedy(temperature: float, logits: Floats, seed: int) -> None:
    assert draw(logits, Sampling(temperature=temperature, top_p=0.5), seed).id == logits.argmax()


@given(vocabularies, st.integers())
def test_one_candidate_is_greedy(logits: Floats, seed: int) -> None:
    assert draw(logits, Sampling(temperature=1.9, top_p=0.0), seed).id == logits.argmax()
    for sampling in (Sampling(temperature=1.9, top_k=1), Sampling(temperature=1.9, min_p=1.0)):
        assert logits[draw(logits, sampling, seed).id] == logits.max()


@given(vocabularies, filters, st.integers())
def test_a_draw_is_never_outside_the_filters(logits: Floats, sampling: Sampling, seed: int) -> None:
    assert distribution(logits, sampling)[draw(logits, sampling, seed).id] > 0


@pytest.mark.parametrize("sampling", [WARM, Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=1.5, top_k=5)])
def test_draws_come_as_often_as_they_should(sampling: Sampling) -> None:
    logits = logits_of(5, 3 * BLOCK + 7, 4)
    expected = distribution(logits, sampling).astype(np.float64)
    sampler = Sampler(sampling, [], END, 7)
    times = np.bincount([sampler.draw(logits).id for _ in range(4000)], minlength=len(logits))
    assert not times[expected == 0].any()
    common = expected * 4000 >= 10
    rest = max(expected[~common].sum() * 4000, 1e-9)
    wanted = np.append(expected[common] * 4000, rest)
    found = np.append(times[common], times[~common].sum())
    chi_squared = ((found - wanted) ** 2 / wanted).sum()
    assert chi_squared < len(wanted) + 4 * math.sqrt(2 * len(wanted))


@given(st.integers(1, 3 * BLOCK), st.data())
def test_a_place_without_weight_is_never_picked(size: int, data: st.DataObject) -> None:
    class Highest:
        def random(self) -> float:
            return data.draw(st.sampled_from([0.0, 0.5, 1 - 2**-53]))

    weights = np.zeros(size, np.float32)
    places = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=5))
    weights[list(places)] = data.draw(st.sampled_from([1e-45, 1e-6, 1.0]))
    assert pick(weights, Highest()) in places  # type: ignore[arg-type]


def test_a_seed_and_the_logits_decide_alone() -> None:
    rows = [logits_of(seed) for seed in range(20)]

    def answer(seed: int | None, disturb: Callable[[], object] = lambda: None) -> list[int]:
        sampler = Sampler(WARM, [], END, seed)
        ids = []
        for row in rows:
            disturb()
            ids.append(sampler.draw(row).id)
        return ids

    other = Sampler(WARM, [], END, 5)
    assert answer(5) == answer(5, lambda: other.draw(rows[0]))
    assert answer(5) == answer(5, lambda: np.random.seed(0))
    assert answer(5) != answer(6)
    assert answer(-5) == answer(-5) != answer(5)
    assert answer(None) != answer(None)


def test_the_draw_of_a_row_in_a_batch_is_that_of_the_row_alone() -> None:
    batch = np.stack([logits_of(seed, 1001) for seed in range(4)])
    sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, logprobs=3)
    for row in batch:
        assert draw(row, sampling, prompt=[1, 2]) == draw(row.copy(), sampling, prompt=[1, 2])


def forbid_one(logits: Floats, generated: Sequence[int]) -> None:
    logits[1] = -np.inf


def test_the_logits_that_come_in_stay_as_they_are() -> None:
    logits = logits_of(1)
    logits.flags.writeable = False
    every = Sampling(1, 0.8, 0.9, 40, 1.3, (), 0.01, 0.5, 0.5, 5, 2)
    sampler = Sampler(every, [1, 2, 3], END, 1, [forbid_one, forbid_one])
    for _ in range(3):
        sampler.draw(logits)


def test_masks_see_what_was_generated_and_come_after_penalties() -> None:
    seen = []

    def only(logits: Floats, generated: Sequence[int]) -> None:
        seen.append(list(generated))
        logits[:] = -np.inf
        logits[3 + len(generated)] = 0

    sampler = Sampler(Sampling(repetition_penalty=2.0, presence_penalty=2.0), [3, 4], END, None, [forbid_one, only])
    assert [sampler.draw(logits_of(2)).id for _ in range(3)] == [3, 4, 5]
    assert seen == [[], [3], [3, 4]]


answers = st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=5)


@given(answers, st.integers(), st.sampled_from([0.0, 1.0, 5.0]), st.sampled_from([1.0, 1.5]))
def test_one_of_some_answers_comes_out(choices: list[list[int]], seed: int, temperature: float, penalty: float) -> None:
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, top_p=0.9)
    sampler = Sampler(sampling, [1, 2], END, seed, [one_of(choices, END)])
    logits = logits_of(seed % 7, 9)
    answer = [sampler.draw(logits).id]
    while answer[-1] != END:
        answer.append(sampler.draw(logits).id)
    assert answer[:-1] in choices


def test_one_of_weighs_answers_by_the_model() -> None:
    logits = np.array([0, 5, 1, 2, 9], np.float32)
    assert draw(logits, masks=[one_of([[2], [3]], END)]).id == 3
    found = {draw(logits, WARM, seed, [one_of([[2], [3]], END)]).id for seed in range(50)}
    assert found == {2, 3}


@pytest.mark.parametrize("choices", [[], [[1, END, 2]]])
def test_a_grammar_that_could_not_end_is_refused(choices: list[list[int]]) -> None:
    with pytest.raises(InvalidRequest):
        one_of(choices, END)


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(repetition_penalty=1.3), replace(WARM, top_p=0.5)])
@pytest.mark.parametrize(
    ("bad", "message"), [(math.nan, "not finite"), (math.inf, "not finite"), (-math.inf, "No token is allowed")]
)
@pytest.mark.parametrize("masks", [(), (forbid_one,)])
def test_logits_that_cannot_be_drawn_from_are_an_error(
    sampling: Sampling, bad: float, message: str, masks: Sequence[Mask]
) -> None:
    logits = logits_of(1)
    logits[1 if bad != -math.inf else slice(None)] = bad
    with pytest.raises(CollegiumError, match=message):
        draw(logits, sampling, masks=masks, prompt=[1, 2])


def test_a_grammar_that_forbids_all_is_an_error_and_not_a_token() -> None:
    sampler = Sampler(Sampling(min_tokens=1), [], END, None, [one_of([[]], END)])
    with pytest.raises(CollegiumError, match="No token is allowed"):
        sampler.draw(logits_of(1))


@given(vocabularies, st.integers(0, 20), filters)
def test_log_probabilities_are_the_models_own(logits: Floats, most: int, sampling: Sampling) -> None:
    import torch

    expected = torch.tensor(logits.astype(np.float64)).log_softmax(-1).numpy()
    changed = replace(sampling, logprobs=most, repetition_penalty=1.5, presence_penalty=1.0)
    token = draw(logits, changed, prompt=[1], masks=[forbid_one] if len(logits) > 2 else [])
    assert token.logprob == pytest.approx(expected[token.id], abs=1e-4)
    assert token.top is not None
    assert len(token.top) == min(most, len(logits))
    assert [one for one, _ in token.top] == np.argsort(-logits, kind="stable")[:most].tolist()
    assert [value for _, value in token.top] == pytest.approx([expected[one] for one, _ in token.top], abs=1e-4)


def test_nobody_pays_for_log_probabilities_that_are_not_asked_for() -> None:
    token = draw(logits_of(1))
    assert (token.logprob, token.top) == (None, None)
    assert draw(logits_of(1), Sampling(logprobs=0)).top == ()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_p", (-0.1, 1.1, math.nan)),
        ("top_k", (-1,)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0, -1, math.nan, math.inf)),
        ("presence_penalty", (-2.1, 2.1, math.nan)),
        ("frequency_penalty", (-2.1, 2.1, math.nan)),
        ("logprobs", (-1, 21)),
        ("min_tokens", (-1,)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(InvalidRequest, match=f"{name} is {value}") as caught:
            draw(logits_of(1), Sampling(**wrong))
        assert caught.value.hint


def test_the_coldest_and_the_widest_do_not_overflow() -> None:
    logits = np.array([-1e38, 1e38, 0, -np.inf], np.float32)
    assert draw(logits, Sampling(temperature=0.01, top_p=0.99, logprobs=4)).id == 1
