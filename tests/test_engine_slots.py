from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from collegium.errors import ArtifactCorrupt
from collegium.experts.engine.slots import Adapter, AdapterSlots

LAW, CODE, TAX = (Adapter(name, Path(name)) for name in ("law", "code", "tax"))


class Decoder:
    """What was last loaded into each slot; half of something where that failed."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.loads = 0
        self.broken: set[str] = set()

    def load(self, slot: int, adapter: Adapter) -> None:
        self.loads += 1
        self.held[slot] = "half of something"
        if adapter.version in self.broken:
            raise ArtifactCorrupt(f"{adapter.version} is broken.")
        self.held[slot] = adapter.version


def test_no_adapter_is_slot_0_and_loads_nothing() -> None:
    decoder = Decoder()
    slots = AdapterSlots(0, decoder.load)
    assert slots.acquire(None) == 0
    slots.release(0)
    slots.release(0)
    assert decoder.loads == 0
    assert slots.acquire(LAW) is None


def test_an_adapter_is_loaded_once_and_shared() -> None:
    decoder = Decoder()
    slots = AdapterSlots(2, decoder.load)
    assert slots.acquire(LAW) == slots.acquire(LAW) == 1
    assert slots.acquire(CODE) == 2
    assert decoder.loads == 2
    assert slots.resident == ["law", "code"]


def test_the_least_recently_used_leaves_but_never_a_pinned_one() -> None:
    decoder = Decoder()
    slots = AdapterSlots(2, decoder.load)
    law, code = slots.acquire(LAW), slots.acquire(CODE)
    assert law
    assert code
    assert slots.acquire(TAX) is None
    assert slots.used == 2
    slots.release(code)
    slots.release(law)
    assert slots.used == 0
    slots.acquire(LAW)  # used more recently than code now
    slots.release(law)
    assert slots.acquire(TAX) == code
    assert slots.resident == ["law", "tax"]
    assert slots.acquire(LAW) == law
    assert slots.acquire(CODE) is None


def test_a_slot_is_empty_after_a_failed_load() -> None:
    decoder = Decoder()
    slots = AdapterSlots(1, decoder.load)
    slots.release(slots.acquire(LAW) or 0)
    decoder.broken = {"code"}
    for _ in range(3):
        with pytest.raises(ArtifactCorrupt):
            slots.acquire(CODE)
        assert slots.resident == []
    assert slots.acquire(LAW) == 1
    assert decoder.held == {1: "law"}
    assert decoder.loads == 5


def test_a_release_too_many_is_a_bug_that_shows() -> None:
    slots = AdapterSlots(1, Decoder().load)
    slots.release(slots.acquire(LAW) or 0)
    with pytest.raises(AssertionError, match="more often"):
        slots.release(1)


class Slots(RuleBasedStateMachine):
    """Three slots, five adapters, of which some cannot be loaded at times."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.slots = AdapterSlots(3, self.decoder.load)
        self.pinned: list[tuple[int, str]] = []

    @rule(name=st.sampled_from("abcde"))
    def acquire(self, name: str) -> None:
        resident = self.slots.resident
        kept = {version for _, version in self.pinned}
        try:
            slot = self.slots.acquire(Adapter(name, Path(name)))
        except ArtifactCorrupt:
            assert name in self.decoder.broken
            assert name not in self.slots.resident
            return
        if slot is None:
            assert len(kept) == 3
            assert name not in kept
            assert self.slots.resident == resident
            return
        assert 1 <= slot <= 3
        left = {*resident} - {*self.slots.resident}
        assert left <= {*[version for version in resident if version not in kept][:1]}, "the least recent one leaves"
        self.pinned.append((slot, name))

    @rule(data=st.data())
    @precondition(lambda self: self.pinned)
    def release(self, data: st.DataObject) -> None:
        slot, _ = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.slots.release(slot)

    @rule(names=st.sets(st.sampled_from("abcde")))
    def damage(self, names: set[str]) -> None:
        self.decoder.broken = names

    @invariant()
    def pinned_adapters_are_where_they_were(self) -> None:
        assert all(self.decoder.held[slot] == version for slot, version in self.pinned)

    @invariant()
    def residents_are_what_was_loaded(self) -> None:
        resident = self.slots.resident
        assert len(resident) == len({*resident}) <= 3
        assert {*resident} <= {*self.decoder.held.values()}


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
