from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from collegium.experts.engine.batch import PAGE
from collegium.experts.engine.pages import PagePool, Reservation


def prompt(letters: str, more: int = 0) -> list[int]:
    """One page a letter, and some tokens."""
    return [ord(letter) for letter in letters for _ in range(PAGE)] + [0] * more


def reserve(pool: PagePool, tokens: Sequence[int], total: int | None = None, key: str = "law") -> Reservation:
    reservation = pool.reserve(tokens, len(tokens) if total is None else total, key)
    assert reservation
    return reservation


def served(pool: PagePool, tokens: Sequence[int], key: str = "law") -> Reservation:
    """A reservation whose tokens are all computed."""
    reservation = reserve(pool, tokens, key=key)
    pool.filled(reservation, tokens, len(tokens))
    return reservation


def test_a_prompt_that_begins_like_another_shares_its_full_pages() -> None:
    pool = PagePool(10)
    first = served(pool, prompt("ab", 3))
    second = reserve(pool, prompt("ab", 5), 50)
    assert second.reused == 2 * PAGE
    assert second.pages[:2] == first.pages[:2]
    assert not {*second.pages[2:]} & {*first.pages}
    assert (pool.used, len(second.pages)) == (5, 4)
    other = reserve(pool, prompt("ac", 3))
    assert other.reused == PAGE
    assert other.pages[0] == first.pages[0]
    assert (pool.hits, pool.asked) == (3 * PAGE, 35 + 37 + 35)


def test_what_is_not_computed_yet_is_not_shared() -> None:
    pool = PagePool(10)
    first = reserve(pool, prompt("ab", 3))
    assert reserve(pool, prompt("ab", 3)).reused == 0
    pool.filled(first, prompt("ab", 3), PAGE + 15)
    assert reserve(pool, prompt("ab", 3)).reused == PAGE


@pytest.mark.parametrize(("more", "reused"), [(0, PAGE), (1, 2 * PAGE)])
def test_the_last_token_of_a_prompt_is_always_computed(more: int, reused: int) -> None:
    pool = PagePool(10)
    served(pool, prompt("ab", more))
    assert reserve(pool, prompt("ab", more)).reused == reused


def test_an_answer_is_reused_by_the_next_turn() -> None:
    pool = PagePool(10)
    tokens = prompt("a", 4)
    first = reserve(pool, tokens, 3 * PAGE)
    for _ in range(20):
        pool.filled(first, tokens, len(tokens))
        tokens.append(7)
    pool.release(first)
    assert reserve(pool, [*tokens, 8, 9]).reused == 2 * PAGE


def test_what_follows_a_reused_beginning_is_shared_too() -> None:
    pool = PagePool(10)
    served(pool, prompt("a", 1))
    assert served(pool, prompt("abc", 1)).reused == PAGE
    assert reserve(pool, prompt("abc", 1)).reused == 3 * PAGE


def test_keys_do_not_share() -> None:
    pool = PagePool(10)
    served(pool, prompt("ab", 1), key="law")
    assert reserve(pool, prompt("ab", 1), key="code").reused == 0


def test_the_same_page_after_another_beginning_is_another_page() -> None:
    pool = PagePool(10)
    served(pool, prompt("ab", 1))
    assert reserve(pool, prompt("cb", 1)).reused == 0
    assert reserve(pool, prompt("b", 1)).reused == 0


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(4)
    held = served(pool, prompt("ab", 1))
    assert pool.reserve(prompt("ab", 1), 5 * PAGE, "law") is None
    assert (pool.free, pool.cached, pool.used, pool.hits, pool.asked) == (1, 0, 3, 0, 33)
    pool.release(held)
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)
    # Both cached pages are wanted, so they cannot be written over too.
    assert pool.reserve(prompt("ab", 1), 5 * PAGE, "law") is None
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)
    assert reserve(pool, prompt("ab", 1), 4 * PAGE).reused == 2 * PAGE


def test_what_was_used_longest_ago_leaves_first_and_beginnings_stay_longest() -> None:
    pool = PagePool(6)
    old, young = served(pool, prompt("ab")), served(pool, prompt("cd"))
    pool.release(old)
    pool.release(young)
    reserve(pool, prompt("x"), 3 * PAGE)  # two are free, the third is the end of the older one
    assert reserve(pool, prompt("ab", 1)).reused == PAGE


def test_what_is_reused_stays_longer() -> None:
    pool = PagePool(4)
    for one in [served(pool, prompt("ab")), served(pool, prompt("cd"))]:
        pool.release(one)
    pool.release(reserve(pool, prompt("a", 1)))  # writes over `b`
    assert (pool.free, pool.cached) == (1, 3)
    pool.release(reserve(pool, prompt("x"), 3 * PAGE))  # writes over `d` and `c`
    assert (pool.free, pool.cached) == (3, 1)
    assert reserve(pool, prompt("c", 1)).reused == 0
    assert reserve(pool, prompt("a", 1)).reused == PAGE


def test_two_that_computed_the_same_leave_one_copy() -> None:
    pool = PagePool(6)
    both = [reserve(pool, prompt("ab", 1)) for _ in range(2)]
    for one in both:
        pool.filled(one, prompt("ab", 1), 2 * PAGE + 1)
    for one in both:
        pool.release(one)
    assert (pool.free, pool.cached) == (4, 2)


def test_a_second_release_and_a_late_step_do_nothing() -> None:
    pool = PagePool(4)
    shared = [served(pool, prompt("a", 1)) for _ in range(2)]
    pool.release(shared[0])
    pool.release(shared[0])
    pool.filled(shared[0], prompt("a", 40), PAGE + 40)
    assert pool.used == 2
    assert reserve(pool, prompt("a", 1)).pages[0] == shared[1].pages[0]


def test_a_step_that_fills_no_page_costs_nothing_whatever_the_length() -> None:
    pool = PagePool(2000)
    tokens = prompt("a" * 1900, 1)
    reservation = served(pool, tokens)
    start = time.perf_counter()
    for _ in range(1000):
        pool.filled(reservation, tokens, len(tokens))
    assert time.perf_counter() - start < 0.1  # a thousandth of it a step; hashing anew would take seconds


@dataclass(eq=False)
class Running:
    """A sequence, and how much of it is written."""

    reservation: Reservation
    key: str
    tokens: list[int]
    total: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class Pool(RuleBasedStateMachine):
    """A small pool, beside a memory that remembers what was really written where."""

    live: Bundle[Running] = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7)
        self.memory: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.running: list[Running] = []

    @rule(
        target=live,
        letters=st.text("ab", max_size=4),
        more=st.integers(0, 3),
        grow=st.integers(0, 40),
        key=st.sampled_from(["law", "code"]),
    )
    def reserve(self, letters: str, more: int, grow: int, key: str) -> Running:
        tokens = prompt(letters, more)
        before = (self.pool.free, self.pool.cached, self.pool.used)
        reservation = self.pool.reserve(tokens, len(tokens) + grow, key)
        needed = -(-(len(tokens) + grow) // PAGE)
        if reservation is None:
            assert needed > self.pool.free + self.pool.cached
            assert before == (self.pool.free, self.pool.cached, self.pool.used)
            return Running(Reservation([], 0, 0, b""), key, tokens, 0)
        assert len(reservation.pages) == len({*reservation.pages}) == needed
        assert reservation.reused % PAGE == 0
        assert reservation.reused < max(len(tokens), 1)
        sequence = Running(reservation, key, tokens, len(tokens) + grow, reservation.reused, list(reservation.pages))
        others = {page for one in self.running for page in one.pages}
        assert not others & {*reservation.pages[reservation.reused // PAGE :]}
        self.running.append(sequence)
        return sequence

    @rule(sequence=live, steps=st.integers(1, 40), tell=st.booleans())
    def compute(self, sequence: Running, steps: int, tell: bool) -> None:
        for _ in range(steps):
            if sequence.computed == sequence.total:
                break
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(ord("a"))
            at = sequence.computed
            page = sequence.pages[at // PAGE]
            assert sum(page in one.pages for one in self.running) == 1, "writes into a page that others read"
            self.memory[page, at % PAGE] = (sequence.key, tuple(sequence.tokens[: at + 1]))
            sequence.computed += 1
        if tell:
            self.pool.filled(sequence.reservation, sequence.tokens, sequence.computed)

    @rule(sequence=consumes(live), again=st.booleans())
    def release(self, sequence: Running, again: bool) -> None:
        self.pool.release(sequence.reservation)
        if again:
            self.pool.release(sequence.reservation)
            self.pool.filled(sequence.reservation, sequence.tokens, sequence.computed)
        self.running = [one for one in self.running if one is not sequence]

    @rule()
    @precondition(lambda self: not self.running)
    def nothing_is_used_by_nobody(self) -> None:
        assert self.pool.used == 0

    @invariant()
    def counts_add_up(self) -> None:
        assert self.pool.used == len({page for one in self.running for page in one.pages})
        assert min(self.pool.free, self.pool.cached) >= 0
        assert self.pool.hits <= self.pool.asked

    @invariant()
    def every_sequence_reads_what_it_should(self) -> None:
        for one in self.running:
            for at in range(one.computed):
                written = self.memory[one.pages[at // PAGE], at % PAGE]
                assert written == (one.key, tuple(one.tokens[: at + 1]))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
