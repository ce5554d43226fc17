"""A domain is live as soon as it is registered: routed, retrieved, cited; and gone when it is removed, until rolled back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from collegium.errors import CollegiumError, InvalidRequest, NameTaken, UnknownExpert, UnsupportedModel
from collegium.experts.home import Home
from collegium.experts.probe import make_canary
from collegium.experts.shrunk import Shrunk, open_shrunk
from collegium.router.artifact import RouterArtifact
from collegium.runtime import Collegium
from collegium.schema import ARTIFACT, Card, Evidence, Lora, Proxy, Score
from collegium.settings import Settings
from collegium.tests.engine_models import tiny_lora
from collegium.training.domain import NewDomain, read_prompts
from collegium.training.register import Pairing, register, unregister

ASKED = "a river, a mountain, a guitar and a violin"
BOOK = "The guitar and the violin.\n\nA river, a mountain: a guitar and a violin by the river.\n"
PROMPTS = ("the guitar and the violin", "a violin by the river", "is the guitar a violin")


@pytest.fixture
def home(fresh_settings: Settings) -> Iterator[Home]:
    with Home(fresh_settings) as opened:
        yield opened


@pytest.fixture
def running(fresh_settings: Settings) -> Iterator[Collegium]:
    """Open before anything is registered, as a server is."""
    with Collegium.open(fresh_settings) as opened:
        yield opened


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "songs").mkdir(parents=True)
    (folder / "songs" / "one.md").write_text(BOOK, "utf-8")
    (folder / "two.txt").write_text("A recipe of soup in the kitchen, with a guitar.", "utf-8")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    return folder


def silent(what: str, done: int, total: int) -> None:
    pass


def add(home: Home, domain: NewDomain, *, name: str | None = None, adapter: Path | None = None) -> Card:
    return register(home, domain, name=name, adapter=adapter, progress=silent)


def domains(home: Home) -> tuple[str, ...]:
    """What the live router tells apart."""
    return RouterArtifact.load(home.artifacts.verify(home.release().router)).head.domains


def test_documents_are_live_at_once(home: Home, running: Collegium, docs: Path, prompts: Mapping[str, str]) -> None:
    assert running.route(ASKED).reason == "unknown_domain"
    notes: list[str] = []
    told: list[tuple[str, int, int]] = []
    card = register(
        home,
        NewDomain("music", "Guitars and violins.", (docs,)),
        progress=lambda *one: told.append(one),
        notes=notes.append,
    )
    reply = running.chat(ASKED)
    assert (card.name, card.domain, card.spec.kind) == ("music", "music", "base")
    assert (card.evidence.description, card.evidence.created > "2") == ("Guitars and violins.", True)
    assert (reply.decision.domain, reply.decision.reason, reply.expert_version) == ("music", "routed", card.version)
    assert "songs/one.md" in {passage.document for passage in reply.citations}
    for passage in reply.citations:
        assert passage.text == (docs / passage.document).read_text("utf-8")[slice(*passage.span)]
        assert passage.index_version == home.release().indexes["music"]
    assert len(notes) == 1
    assert "photo.png" in notes[0]
    assert ("indexing passages", 2, 2) in told
    for name in ("law", "code"):
        assert running.route(prompts[name]).expert == name


@pytest.mark.parametrize(
    "domain",
    [
        NewDomain("music", description="the guitar and the violin"),
        NewDomain("music", prompts=PROMPTS),
        NewDomain("music", "the guitar and the violin", prompts=PROMPTS),
    ],
    ids=["description", "prompts", "both"],
)
def test_documents_are_not_needed(home: Home, running: Collegium, domain: NewDomain) -> None:
    before = home.release()
    card = add(home, domain)
    reply = running.chat("the guitar and the violin")
    assert (reply.decision.expert, reply.expert_version, reply.citations) == ("music", card.version, ())
    assert home.release().indexes == before.indexes
    assert home.release().parent == before.id


def test_a_domain_that_the_router_knows_keeps_its_class(home: Home, running: Collegium, docs: Path) -> None:
    before = home.release()
    assert running.route("explain the fever and the vaccine").reason == "no_expert"
    add(home, NewDomain("health", docs=(docs,)))
    assert running.route("explain the fever and the vaccine").reason == "routed"
    assert home.release().router == before.router
    unregister(home, "health")
    assert "health" in domains(home)
    assert home.release().router == before.router


def test_a_given_adapter_answers(
    home: Home, running: Collegium, adapters: Mapping[str, Path], prompts: Mapping[str, str]
) -> None:
    expected = running.chat(prompts["math"], expert="code").text
    card = add(home, NewDomain("math"), adapter=adapters["code"])
    reply = running.chat(prompts["math"])
    assert isinstance(card.spec, Lora)
    assert card.spec.rank == 4
    assert (reply.expert_version, reply.mode, reply.text) == (card.version, "lora", expected)


def test_an_expert_without_a_domain_is_asked_for_by_name(
    home: Home, running: Collegium, adapters: Mapping[str, Path], prompts: Mapping[str, str]
) -> None:
    before = home.release()
    card = register(home, None, name="counsel", adapter=adapters["code"], progress=silent)
    assert (card.domain, card.spec.kind) == ("", "lora")
    assert card.evidence.created
    assert (home.release().router, home.release().indexes) == (before.router, before.indexes)
    reply = running.chat(prompts["math"], expert="counsel")
    assert (reply.expert_version, reply.text) == (card.version, running.chat(prompts["math"], expert="code").text)
    assert running.route(prompts["law"]).expert == "law"
    again = register(home, None, name="counsel", adapter=adapters["law"], progress=silent)
    assert home.cards(home.release())["counsel"] == again != card
    for name, domain in (("counsel", NewDomain("music", "Guitars.")), ("law", None)):
        with pytest.raises(NameTaken, match=f"{name} answers for"):
            register(home, domain, name=name, adapter=adapters["law"], progress=silent)
    for name in ("", "base", "Music"):
        with pytest.raises(InvalidRequest, match="cannot be a name"):
            register(home, None, name=name, adapter=adapters["law"], progress=silent)
    with pytest.raises(InvalidRequest, match="would be the base model") as caught:
        register(home, None, name="nobody", progress=silent)
    assert caught.value.hint
    after = unregister(home, "counsel")
    assert "counsel" not in after.aliases
    assert after.router == before.router


def test_an_adapter_of_another_model_is_held_against_that(
    home: Home, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    base = home.models.get(home.settings.base_model)
    (tmp_path / "shrunk").mkdir()
    Shrunk(base.identity, (1,)).save(tmp_path / "shrunk")
    version = home.artifacts.put(tmp_path / "shrunk")
    small = open_shrunk(version, base, home.artifacts, home.models)
    adapter = tiny_lora(tmp_path / "adapter", small.folder)
    pairing = Pairing(small, lambda lora: Proxy(lora.adapter, lora.rank, small=f"{ARTIFACT}{version}"))
    with pytest.raises(UnsupportedModel, match=r"layers\.1"):
        register(home, None, name="steered", adapter=adapters["code"], pairing=pairing, progress=silent)
    card = register(home, None, name="steered", adapter=adapter, pairing=pairing, progress=silent)
    assert isinstance(card.spec, Proxy)
    assert (card.base, card.spec.rank) == (base.identity, 4)
    assert card.evidence.canary == make_canary(home.artifacts.verify(card.spec.adapter), small)


def test_an_expert_may_have_another_name_than_its_domain(home: Home, running: Collegium) -> None:
    add(home, NewDomain("music", prompts=PROMPTS), name="maestro-2")
    decision = running.route("the guitar and the violin")
    assert (decision.domain, decision.expert) == ("music", "maestro-2")


def test_new_documents_keep_the_adapter_and_the_scores(home: Home, running: Collegium, docs: Path) -> None:
    old = home.cards(home.release())["law"]
    measured = replace(old, evidence=replace(old.evidence, scores=(Score("t", "accuracy", 0.9, 0.8, 1.0, 0.5, 9),)))
    home.registry.publish(cards=[measured], note="measured")
    card = add(home, NewDomain("law", docs=(docs / "songs",)))
    assert card == measured
    first = home.release()
    assert running.chat(ASKED, expert="law").citations
    assert running.chat(ASKED, expert="law").mode == "lora"
    card = add(home, NewDomain("law", "Contracts and songs.", (docs / "two.txt",)))
    assert card == replace(measured, evidence=replace(measured.evidence, description="Contracts and songs."))
    assert home.cards(home.release())["law"] == card
    assert {passage.document for passage in running.chat(ASKED, expert="law").citations} <= {"two.txt"}
    assert home.release().indexes["law"] != first.indexes["law"]
    second = home.release()
    assert add(home, NewDomain("law")) == card
    assert home.release().indexes == second.indexes


def test_a_new_adapter_replaces_the_old_one(home: Home, adapters: Mapping[str, Path]) -> None:
    old = home.cards(home.release())["law"]
    evidence = Evidence("Trained again.", gate="better", licence="CC0")
    card = register(home, NewDomain("law"), adapter=adapters["code"], evidence=evidence, progress=silent)
    assert card.version != old.version
    assert card.evidence.canary
    assert replace(card.evidence, canary=None) == evidence
    assert home.cards(home.release())["law"] == card
    assert home.registry.card(old.version) == old


@pytest.mark.parametrize(
    "name",
    [
        *("auto", "base", "none", "", "Music", "mu sic", "-music", "_music", "../music", "mu/sic", "mu.sic", "müsic"),
        *("a@b", "music\n", "m" * 65),
    ],
)
def test_reserved_and_malformed_names_are_refused(home: Home, name: str) -> None:
    before = home.release()
    for domain, expert in ((name, None), (name, "music"), ("music", name)):
        if not name and expert == "":
            continue  # no name is the domain's
        with pytest.raises(InvalidRequest, match="cannot be a name") as caught:
            add(home, NewDomain(domain, "Guitars."), name=expert)
        assert caught.value.hint
        assert "small letters" in caught.value.hint
    assert home.release() == before


@pytest.mark.parametrize("name", ["a", "7", "m" * 64, "a-b_c-9"])
def test_other_names_are_taken(home: Home, name: str) -> None:
    assert add(home, NewDomain(name, "the guitar and the violin")).name == name
    assert name in domains(home)


def test_a_domain_has_one_expert_and_an_expert_one_domain(home: Home) -> None:
    before = home.release()
    with pytest.raises(NameTaken, match="law answers for law already") as caught:
        add(home, NewDomain("law", "Contracts."), name="barrister")
    assert caught.value.hint
    with pytest.raises(NameTaken, match="law"):
        add(home, NewDomain("music", prompts=PROMPTS), name="law")
    assert home.release() == before


def broken(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}), "utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_a_failed_registration_publishes_nothing(home: Home, docs: Path, tmp_path: Path) -> None:
    before, known = home.release(), domains(home)
    ia3 = broken(tmp_path / "ia3")
    tries: list[tuple[NewDomain, Path | None, type[CollegiumError]]] = [
        (NewDomain("music"), None, InvalidRequest),
        (NewDomain("music", " "), None, InvalidRequest),
        (NewDomain("music", "Guitars.", (tmp_path / "nowhere",)), None, InvalidRequest),
        (NewDomain("music", "Guitars.", (docs / "photo.png",)), None, InvalidRequest),
        (NewDomain("music", "Guitars.", (docs,)), tmp_path / "nowhere", InvalidRequest),
        (NewDomain("music", "Guitars.", (docs,)), ia3, UnsupportedModel),
        (NewDomain("law"), ia3, UnsupportedModel),
    ]
    for domain, adapter, error in tries:
        with pytest.raises(error):
            add(home, domain, adapter=adapter)
    assert home.release() == before
    assert len(home.registry.releases()) == 1
    assert domains(home) == known


def test_removing_takes_a_users_own_domain_with_it_and_rollback_brings_it_back(
    home: Home, running: Collegium, docs: Path
) -> None:
    known = domains(home)
    add(home, NewDomain("music", docs=(docs,)))
    before, reply = home.release(), running.chat(ASKED)
    after = unregister(home, "music")
    assert after == home.release()
    assert domains(home) == known
    assert "music" not in after.indexes
    assert "music" not in after.aliases
    assert running.route(ASKED).reason == "unknown_domain"
    home.registry.rollback(before.id)
    again = running.chat(ASKED)
    assert (again.text, again.citations, again.decision) == (reply.text, reply.citations, reply.decision)


def test_removing_keeps_a_domain_that_was_shipped(home: Home, running: Collegium, prompts: Mapping[str, str]) -> None:
    before = home.release()
    after = unregister(home, "law")
    assert after.router == before.router
    decision = running.route(prompts["law"])
    assert (decision.domain, decision.reason, decision.expert) == ("law", "no_expert", "base")
    home.registry.rollback(before.id)
    assert running.route(prompts["law"]).expert == "law"


def test_removing_a_domain_that_the_router_forgot(home: Home) -> None:
    """As a router that is fitted anew does with domains that were added by hand."""
    old = home.release().router
    add(home, NewDomain("music", prompts=PROMPTS))
    home.registry.publish(router=old, note="fitted anew")
    assert "music" not in unregister(home, "music").aliases
    add(home, NewDomain("music", prompts=PROMPTS))
    assert "music" in domains(home)


def test_who_is_not_there_or_has_to_stay_is_not_removed(home: Home, fresh_settings: Settings) -> None:
    before = home.release()
    with pytest.raises(UnknownExpert, match="'music'") as caught:
        unregister(home, "music")
    assert caught.value.hint == "Known: base, code, law."
    with pytest.raises(InvalidRequest, match="base"):
        unregister(home, "base")
    with Home(fresh_settings.model_copy(update={"fallback": "law"})) as other, pytest.raises(InvalidRequest):
        unregister(other, "law")
    assert home.release() == before


def test_two_at_once_both_stay(home: Home, fresh_settings: Settings) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def add_in_a_home_of_its_own(name: str) -> Card:
        with Home(fresh_settings) as own:
            return add(own, NewDomain(name, f"the guitar and the violin of {name}"))

    names = ("music", "cooking", "travel")
    with ThreadPoolExecutor(3) as pool:
        cards = list(pool.map(add_in_a_home_of_its_own, names))
    live = home.cards(home.release())
    assert [live[card.name] for card in cards] == cards
    assert set(names) < set(domains(home))


def test_a_long_book_teaches_the_router_evenly(home: Home, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"{'the guitar and the violin ' * 30}{number}" for number in range(450)), "utf-8")
    add(home, NewDomain("music", docs=(book,)))
    artifact = RouterArtifact.load(home.artifacts.verify(home.release().router))
    learnt = [
        source for source, domain in zip(artifact.rows.sources, artifact.rows.domains, strict=True) if domain == "music"
    ]
    assert 100 <= len(learnt) <= 200
    assert set(learnt) == {"user:music"}


def test_prompts_of_a_class_are_read(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text(" one \n\n{two}\r\nthree", "utf-8")
    rows.write_text('{"prompt": "four", "answer": "x"}\n\n{"text": "five"}\n', "utf-8")
    assert read_prompts([text, rows]) == ("one", "{two}", "three", "four", "five")
    assert read_prompts([]) == ()


@pytest.mark.parametrize("line", ["no JSON", "[]", "3", "{}", '{"prompt": 3}', '{"text": null}', '{"prompt": ["a"]}'])
def test_a_row_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "one"}}\n{line}\n', "utf-8")
    with pytest.raises(InvalidRequest, match=r"prompts\.jsonl:2: no prompt"):
        read_prompts([file])


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_of_prompts_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.txt"
    if content:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"prompts\.txt cannot be read"):
        read_prompts([file])
