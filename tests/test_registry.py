from __future__ import annotations

import dataclasses
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from collegium.errors import (
    InvalidRequest,
    UnknownExpert,
)
from collegium.experts.registry import Registry
from collegium.schema import Base, Card, Evidence, Lora, Release, Score

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/home/registry.db"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry.open(url)
    yield registry
    registry.close()


def card(name: str, number: int = 0, **evidence: Any) -> Card:
    return Card(name, name, Lora(f"{number:064x}", 8), "base", None, Evidence(**evidence))


def test_a_new_registry_is_empty(registry: Registry) -> None:
    assert registry.live() is None
    assert registry.cards() == ()
    assert registry.releases() == ()


def test_what_was_published_is_live_and_stays(registry: Registry, url: str) -> None:
    law = dataclasses.replace(
        card("law", description="contracts, été", scores=(Score("cuad", "f1", 0.5, 0.4, 0.6, 0.1, 300),)),
        system="You are a lawyer.",
    )
    base = Card("base", "chat", Base(), "base")
    before = datetime.now(UTC) - timedelta(seconds=1)
    release = registry.publish(
        cards=[law, base], aliases={"law": law.version}, router="r1", indexes={"law": "i1"}, note="first"
    )
    assert release == Release(1, {"law": law.version}, "r1", {"law": "i1"}, None, "first", release.created)
    assert before < datetime.fromisoformat(release.created) <= datetime.now(UTC)
    registry.close()
    again = Registry.open(url)
    assert again.live() == release
    assert again.cards() == (base, law)
    assert again.card(law.version) == law
    again.close()


def test_a_publish_changes_only_what_it_names(registry: Registry) -> None:
    law, tax = card("law"), card("tax")
    aliases = {"law": law.version, "tax": tax.version}
    registry.publish(cards=[law, tax], aliases=aliases, router="r1", indexes={"law": "i", "tax": "i"}, note="")
    second = registry.publish(aliases={"law": None, "never": None}, indexes={"tax": "i2", "law": None}, note="less")
    assert (second.aliases, second.router, second.indexes) == ({"tax": tax.version}, "r1", {"tax": "i2"})
    assert second.parent == 1
    assert registry.publish(router="r2", note="").router == "r2"
    assert registry.cards() == (law, tax)
    assert [release.id for release in registry.releases()] == [3, 2, 1]


def test_the_same_version_again_renews_its_evidence(registry: Registry) -> None:
    old, new = card("law", gate="refused"), card("law", gate="passed", created="2026-01-01T00:00:00+00:00")
    assert old.version == new.version
    registry.publish(cards=[old], router="r", note="")
    registry.publish(cards=[old, new], note="")
    assert registry.cards() == (new,)


def test_the_first_release_needs_a_router(registry: Registry) -> None:
    with pytest.raises(InvalidRequest, match="router"):
        registry.publish(cards=[card("law")], note="")
    assert registry.cards() == ()
    assert registry.releases() == ()


def test_an_alias_needs_a_card_or_nothing_changes(registry: Registry) -> None:
    first = registry.publish(router="r", note="")
    with pytest.raises(InvalidRequest, match="tax@000000000000"):
        registry.publish(cards=[card("law")], aliases={"tax": "tax@000000000000"}, note="")
    assert registry.releases() == (first,)
    assert registry.cards() == ()
    assert registry.live() == first


def test_rollback_moves_the_pointer_and_the_next_publish_starts_there(registry: Registry) -> None:
    first = registry.publish(router="r1", indexes={"law": "i1"}, note="")
    second = registry.publish(router="r2", indexes={"law": "i2", "tax": "i"}, note="")
    assert registry.rollback(1) == registry.live() == first
    assert registry.releases() == (second, first)
    third = registry.publish(router="r3", note="")
    assert (third.id, third.parent, third.indexes) == (3, 1, {"law": "i1"})
    assert registry.rollback(2) == registry.live() == second


def test_rollback_to_an_unknown_release_lists_those_there_are(registry: Registry) -> None:
    with pytest.raises(InvalidRequest, match="none"):
        registry.rollback(1)
    registry.publish(router="r", note="")
    registry.publish(note="")
    with pytest.raises(InvalidRequest, match="Releases: 1, 2"):
        registry.rollback(3)


def test_a_name_means_what_the_release_says(registry: Registry) -> None:
    old, new = card("law", 1), card("law", 2)
    first = registry.publish(cards=[old], aliases={"law": old.version}, router="r", note="")
    second = registry.publish(cards=[new], aliases={"law": new.version, "best law 100%": old.version}, note="")
    assert registry.resolve("law", first) == old
    assert registry.resolve("law", second) == new
    assert registry.resolve("best law 100%", second) == old
    for length in (6, 9, 12):
        assert registry.resolve(new.version[: len("law@") + length], first) == new


@pytest.mark.parametrize(
    "name", ["tax", "law@", "law@{hash:.5}", "law@zzzzzz", "law@000000", "LAW@{hash}", "la_@{hash}", "law@{hash}0", ""]
)
def test_an_unknown_name_lists_the_known_ones(registry: Registry, name: str) -> None:
    law, other = card("law"), card("med")
    aliases = {"law": law.version, "med": other.version}
    release = registry.publish(cards=[law, other], aliases=aliases, router="r", note="")
    with pytest.raises(UnknownExpert) as caught:
        registry.resolve(name.format(hash=law.version.removeprefix("law@")), release)
    assert caught.value.hint == "Known: law, med."
    with pytest.raises(UnknownExpert, match=law.version):
        registry.card("law")


def test_an_ambiguous_prefix_lists_what_it_fits(registry: Registry, url: str) -> None:
    law = card("law")
    release = registry.publish(cards=[law], router="r", note="")
    twin = law.version[:-1] + ("1" if law.version[-1] == "0" else "0")
    with sqlite3.connect(sa.make_url(url).database or "") as connection:
        connection.execute("INSERT INTO cards SELECT ?, name, domain, body, created FROM cards", [twin])
    connection.close()
    with pytest.raises(UnknownExpert) as caught:
        registry.resolve(law.version[:-1], release)
    assert caught.value.hint == f"Known: {', '.join(sorted([law.version, twin]))}."
    assert registry.resolve(law.version, release) == law


def test_a_router_is_found_by_release_or_the_beginning_of_its_version(registry: Registry) -> None:
    with pytest.raises(InvalidRequest, match="none yet"):
        registry.router("1")
    for router in ("aaaaaa1", "aaaaaa2", "bbbbbbb", "bbbbbbb"):
        registry.publish(router=router, note="")
    assert [registry.router(name) for name in ("1", "3", "bbbbbb", "aaaaaa2")] == [
        "aaaaaa1",
        "bbbbbbb",
        "bbbbbbb",
        "aaaaaa2",
    ]
    for name, problem in {"5": "neither", "bbbbb": "neither", "": "neither", "aaaaaa": "several"}.items():
        with pytest.raises(InvalidRequest, match=rf"{problem}.*4 \(bbbbbbb\), .*1 \(aaaaaa1\)"):
            registry.router(name)


class AgainstADict(RuleBasedStateMachine):
    """The registry beside what it should be: a dict of releases and the id of the live one."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.open()
        self.known: dict[int, Release] = {}
        self.current: int | None = None
        self.stored: dict[str, Card] = {}

    def open(self) -> None:
        self.registry = Registry.open(f"sqlite:///{self.folder.name}/registry.db")

    names = st.sampled_from(["law", "tax", "med"])

    @rule(
        cards=st.lists(st.builds(card, names, st.integers(0, 2), gate=st.sampled_from("ab")), max_size=2),
        aliases=st.dictionaries(names, st.tuples(names, st.integers(0, 2)) | st.none(), max_size=2),
        router=st.none() | st.sampled_from(["r1", "r2"]),
        indexes=st.dictionaries(names, st.none() | st.sampled_from(["i1", "i2"]), max_size=2),
    )
    def publish(
        self,
        cards: list[Card],
        aliases: dict[str, tuple[str, int] | None],
        router: str | None,
        indexes: dict[str, str | None],
    ) -> None:
        change = {name: card(*which).version if which else None for name, which in aliases.items()}
        stored = self.stored | {one.version: one for one in cards}
        before = self.known[self.current] if self.current else Release(0, {}, "", {})
        if not (router or before.router) or not stored.keys() >= set(filter(None, change.values())):
            with pytest.raises(InvalidRequest):
                self.registry.publish(cards=cards, aliases=change, router=router, indexes=indexes, note="n")
            return
        release = self.registry.publish(cards=cards, aliases=change, router=router, indexes=indexes, note="n")
        expected = Release(
            id=len(self.known) + 1,
            aliases={name: version for name, version in ({**before.aliases, **change}).items() if version},
            router=router or before.router,
            indexes={name: version for name, version in ({**before.indexes, **indexes}).items() if version},
            parent=self.current,
            note="n",
            created=release.created,
        )
        assert release == expected
        self.known[release.id] = release
        self.current, self.stored = release.id, stored

    @rule(id_=st.integers(0, 6))
    def rollback(self, id_: int) -> None:
        if id_ not in self.known:
            with pytest.raises(InvalidRequest):
                self.registry.rollback(id_)
            return
        assert self.registry.rollback(id_) == self.known[id_]
        self.current = id_

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.open()

    @invariant()
    def is_what_it_should_be(self) -> None:
        assert self.registry.live() == (self.known[self.current] if self.current else None)
        assert self.registry.releases() == tuple(self.known[id_] for id_ in sorted(self.known, reverse=True))
        assert {one.version: one for one in self.registry.cards()} == self.stored

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.registry.close()
            self.folder.cleanup()


def test_publish_and_rollback_do_what_a_dict_would() -> None:
    run_state_machine_as_test(
        AgainstADict, settings=settings(max_examples=12, stateful_step_count=12, deadline=None, database=None)
    )
