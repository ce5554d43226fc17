"""The gate lets the better through, and says of the others what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.training.measuring.evaluate import FREE_QUESTIONS, Results
from collegium.training.measuring.forgetting import GENERAL
from collegium.training.measuring.gate import FEWEST_ROWS, MOST_FORGOTTEN, Verdicts, decide, judge, judged
from collegium.training.measuring.measure import Measured


def one_task(values: Sequence[float], metric: str = "accuracy") -> Results:
    return {("wine", metric): list(values)}


def talking(results: Results, share: float) -> Results:
    return {**results, (FREE_QUESTIONS, "in_sentences"): [1.0] * round(8 * share) + [0.0] * round(8 - 8 * share)}


def test_a_clear_winner_passes() -> None:
    verdict = judge(one_task([1] * 40 + [0] * 10), one_task([0] * 50))
    assert verdict.passed
    assert verdict.gain == pytest.approx(0.8)
    assert 0 < verdict.low < 0.8 < verdict.high < 1
    assert str(verdict).startswith("better: +0.8000")
    assert f"{verdict.low:+.4f} to {verdict.high:+.4f}" in str(verdict)


@pytest.mark.parametrize(
    ("candidate", "base"),
    [
        ([1, 0, 1, 0] * 10, [1, 0, 1, 0] * 10),
        ([0] * 20, [0] * 20),
        ([0] * 40, [1] * 40),
        ([1, 0] * 20, [1] * 40),
        ([1], [0]),
        ([1, 1], [0, 0]),
        ([1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 1]),
        ([1, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_an_equal_a_worse_and_a_lucky_one_are_refused(candidate: list[float], base: list[float]) -> None:
    verdict = judge(one_task(candidate), one_task(base))
    assert not verdict.passed
    assert verdict.low <= verdict.gain == pytest.approx(np.mean(candidate) - np.mean(base))
    assert str(verdict).startswith("not better: ")


def test_who_has_to_beat_several_is_told_who_wins() -> None:
    strong, weak, same = one_task([1] * 30), one_task([0] * 30), one_task([1] * 30)
    both = Verdicts({"the large model alone": judge(strong, weak), "the small expert alone": judge(strong, weak)})
    assert both.passed
    assert str(both).count("better than") == 2
    assert "wins" not in str(both)
    for rival, word, winner in ((same, "; not better than", ""), (one_task([2] * 30), "; worse than", "wins")):
        some = Verdicts({"the large model alone": judge(strong, weak), "the small expert alone": judge(strong, rival)})
        assert not some.passed
        assert f"{word} the small expert alone: " in str(some)
        assert str(some).endswith(f". The small expert alone {winner}") == bool(winner)


def test_a_lower_nll_is_better() -> None:
    low, high = (one_task(np.linspace(start, start + 1, 20).tolist(), "nll") for start in (1, 3))
    assert judge(low, high).passed
    assert judge(low, high).gain == pytest.approx(2)
    assert not judge(high, low).passed


def test_tasks_weigh_the_same_whatever_their_size() -> None:
    candidate: Results = {("large", "accuracy"): [1.0] * 500, ("small", "accuracy"): [0.0] * 20}
    base: Results = {("large", "accuracy"): [0.8] * 500, ("small", "accuracy"): [1.0] * 20}
    verdict = judge(candidate, base)
    assert not verdict.passed
    assert verdict.gain == pytest.approx(-0.4)


def test_a_row_counts_by_its_finest_metric_and_no_row_is_forgotten() -> None:
    candidate: Results = {("wine", "exact_match"): [0.0] * 30, ("wine", "token_f1"): [0.9] * 30}
    base: Results = {("wine", "exact_match"): [0.0] * 30, ("wine", "token_f1"): [0.1] * 30}
    candidate |= {("wine", "semscore"): [0.0] * 30, ("wine", "brier"): [2.0] * 30}
    base |= {("wine", "semscore"): [1.0] * 30, ("wine", "brier"): [0.0] * 30}
    assert judge(candidate, base).gain == pytest.approx(0.8)
    candidate["wine", "accuracy"] = base["wine", "accuracy"] = [0.5] * 30  # other rows of the same file
    assert judge(candidate, base).gain == pytest.approx(0.4)
    assert judge(candidate, base).rows == 60
    candidate["wine", "nll"], base["wine", "nll"] = [4.0] * 60, [1.0] * 60
    assert judge(candidate, base).gain == pytest.approx((30 * 0.8 - 60 * 3) / 120)


@pytest.mark.parametrize(("pairs", "gain"), [(30, -1), (15, -1), (14, 0.5)])
def test_a_task_of_pairs_is_judged_by_what_is_preferred(pairs: int, gain: float) -> None:
    candidate: Results = {("wine", "token_f1"): [1.0] * 30, ("wine", "preference"): [0.0] * pairs}
    base: Results = {("wine", "token_f1"): [0.5] * 30, ("wine", "preference"): [1.0] * pairs}
    assert judge(candidate, base).gain == pytest.approx(gain)
    assert set(judged(candidate)) == {("wine", "preference" if gain < 0 else "token_f1")}


def test_few_rows_prove_nothing() -> None:
    assert not judge(one_task([1] * (FEWEST_ROWS - 1)), one_task([0] * (FEWEST_ROWS - 1))).passed
    assert judge(one_task([1] * FEWEST_ROWS), one_task([0] * FEWEST_ROWS)).passed
    few = judge(one_task([1] * 3), one_task([0] * 3))
    assert str(few).endswith("; but 3 rows are too few to tell, 20 are needed")
    assert not judge(one_task([0] * 3), one_task([1] * 3)).worse


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
@settings(max_examples=30)
def test_small_tasks_are_counted_together(sizes: list[int]) -> None:
    candidate: Results = {(f"task {at}", "nll"): [1.0] * size for at, size in enumerate(sizes)}
    base: Results = {key: [2.0] * len(values) for key, values in candidate.items()}
    verdict = judge(candidate, base)
    assert verdict.gain == pytest.approx(1)
    assert verdict.rows >= min(FEWEST_ROWS, sum(sizes))
    assert verdict.passed == (sum(sizes) >= FEWEST_ROWS)


def test_a_small_task_is_neither_lost_nor_loud() -> None:
    candidate: Results = {("large", "accuracy"): [1.0] * 97, ("small", "accuracy"): [0.0] * 3}
    base: Results = {("large", "accuracy"): [0.0] * 97, ("small", "accuracy"): [1.0] * 3}
    assert judge(candidate, base).gain == pytest.approx(0.94)


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(1, 1, True), (0.75, 1, True), (0.5, 1, False), (0, 0, True)])
def test_who_no_longer_talks_is_refused(ours: float, theirs: float, passed: bool) -> None:
    candidate, base = talking(one_task([1] * 30), ours), talking(one_task([0] * 30), theirs)
    verdict = judge(candidate, base)
    assert verdict.passed == passed
    assert verdict.gain == pytest.approx(1)
    assert ("free questions" in str(verdict)) == (not passed)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
@settings(max_examples=40)
def test_two_never_beat_each_other(pairs: list[tuple[float, float]]) -> None:
    one, other = (one_task(side) for side in zip(*pairs, strict=True))
    assert not judge(one, one).passed
    assert not (judge(one, other).passed and judge(other, one).passed)
    assert judge(one, other) == judge(one, other)


def general(nll: Sequence[float]) -> Results:
    return {(GENERAL, "nll"): list(nll), (GENERAL, "general_accuracy"): [1.0] * 5}


def measured(who: Mapping[str, Results], lost: Sequence[float] = (0.0,) * 40) -> Measured:
    known = {"candidate": general([2 + one for one in lost]), "live": general([2.0] * len(lost))}
    known["base"] = known["live"]
    return Measured(who, {name: known[name] for name in who}, {})


GOOD, BAD = one_task([1] * 40), one_task([0] * 40)


def test_a_better_one_goes_live() -> None:
    verdicts = decide(measured({"candidate": GOOD, "base": BAD}))
    assert verdicts.passed
    assert str(verdicts) == (
        "better than the base: +1.0000 a task (95 % interval +1.0000 to +1.0000). Its loss of general skill is +0.00 nats a "
        "token of general answers (95 % interval +0.00 to +0.00): 0.25 may be lost"
    )


def test_one_that_is_its_base_is_refused() -> None:
    verdicts = decide(measured({"candidate": GOOD, "base": GOOD}))
    assert not verdicts.passed
    assert str(verdicts).startswith("not better than the base: +0.0000 a task")


def test_who_is_live_is_replaced_by_a_better_one_alone() -> None:
    better = decide(measured({"candidate": GOOD, "base": BAD, "live": BAD}))
    assert better.passed
    assert "; better than the live expert: +1.0000" in str(better)
    same = decide(measured({"candidate": GOOD, "base": BAD, "live": GOOD}))
    assert not same.passed
    assert "It cannot be told from the live expert, so nothing would be gained by replacing that" in str(same)
    worse = decide(measured({"candidate": GOOD, "base": BAD, "live": one_task([2] * 40)}))
    assert not worse.passed
    assert "; worse than the live expert: -1.0000" in str(worse)
    assert "The live expert wins" in str(worse)
    assert "cannot be told" not in str(worse)


def test_who_does_not_talk_is_told_so_once() -> None:
    mute, fluent = talking(GOOD, 0), talking(BAD, 1)
    verdicts = decide(measured({"candidate": mute, "base": fluent, "live": fluent}))
    assert not verdicts.passed
    assert str(verdicts).count("labels instead of sentences") == 1


@pytest.mark.parametrize(
    ("lost", "passed"),
    [
        ([0.0] * 40, True),
        ([-1.0] * 40, True),
        ([MOST_FORGOTTEN - 0.01] * 40, True),
        ([MOST_FORGOTTEN + 0.01] * 40, False),
        ([8.0, -7.0] * 20, True),  # more on average, but not beyond doubt
    ],
)
def test_who_forgets_too_much_is_refused(lost: list[float], passed: bool) -> None:
    verdicts = decide(measured({"candidate": GOOD, "base": BAD}, lost))
    assert verdicts.passed == passed
    assert ("it has forgotten too much" in str(verdicts)) == (not passed)
    assert f"{np.mean(lost):+.2f} nats" in str(verdicts)


@pytest.mark.parametrize(
    ("candidate", "base", "passed", "word"),
    [
        ([1] * 40, [0] * 40, True, "better than the base"),
        ([1, 0] * 20, [0, 1] * 20, True, "not worse beyond doubt than the base"),
        ([0] * 40, [1] * 40, False, "worse than the base"),
        ([0] * 4, [1] * 4, True, "4 rows are too few to tell"),
    ],
)
def test_who_reads_worse_than_its_base_is_refused(
    candidate: list[float], base: list[float], passed: bool, word: str
) -> None:
    quoted = {"candidate": one_task(candidate), "base": one_task(base)}
    verdicts = decide(replace(measured({"candidate": GOOD, "base": BAD}), with_context=quoted))
    assert verdicts.passed == passed
    assert "With retrieved passages it is " in str(verdicts)
    assert word in str(verdicts)
