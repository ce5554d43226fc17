"""A Collegium over its home: releases that come and go, artifacts that are damaged, indexes that are quoted from."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from collegium.errors import ArtifactCorrupt, UnknownExpert
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.generation import Generation
from collegium.experts.engine.request import Request
from collegium.experts.home import Home
from collegium.models.cache import ModelCache
from collegium.models.encoder import Encoder
from collegium.retrieval import Document, build_index, chunk
from collegium.runtime import Collegium
from collegium.schema import Card, Combination, Lora, Message, Plugin, Proxy, Remote, Sampling, Spec
from collegium.settings import Settings

MakeSettings = Callable[..., Settings]
LONG = Sampling(max_tokens=300)
DOCUMENT = Document(
    "acts/contract.txt",
    "A contract binds the plaintiff. The court hears the lawsuit.\n\nThe judge explains the statute to the liable.",
)


@pytest.fixture
def running(fresh_settings: Settings) -> Iterator[Collegium]:
    """A Collegium on a home of the test's own."""
    with Collegium.open(fresh_settings) as opened:
        yield opened


@contextmanager
def somebody_else(settings: Settings) -> Iterator[Home]:
    """Another object on the same home, as a training process has."""
    with Home(settings) as home:
        yield home


def adapter_of(card: Card) -> str:
    assert isinstance(card.spec, Lora)
    return card.spec.adapter


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_adapter_is_never_served(
    fresh_settings: Settings, prompts: Mapping[str, str], caplog: pytest.LogCaptureFixture, collegium: Collegium
) -> None:
    with somebody_else(fresh_settings) as home:
        adapter = adapter_of(home.cards(home.release())["law"])
        flip(home.artifacts.path(adapter) / "adapter_model.safetensors")
    with Collegium.open(fresh_settings) as opened, caplog.at_level(logging.ERROR):
        reply = opened.chat(prompts["law"])
        assert opened.chat(prompts["code"]).mode == "lora"
    assert (reply.decision.domain, reply.decision.reason, reply.decision.expert) == ("law", "degraded", "base")
    assert reply.expert_version == collegium.experts()["base"].version
    assert reply.text == collegium.chat(prompts["law"], expert="base").text
    assert adapter in caplog.text
    assert "law" in caplog.text


UNABLE: dict[str, tuple[Callable[[str], Spec], str]] = {
    "no such model": (lambda law: Proxy(law, 4, large="/nowhere/large"), "not the name"),
    "empty model": (lambda law: Proxy(law, 4, large=str(Path(__file__).parent)), "no safetensors"),
    "lost artifact": (lambda law: Proxy(law, 4, small=f"artifact:{'0' * 64}"), "missing"),
    "wrong method": (lambda law: Proxy(law, 4, combination=Combination("comblm", weights=(1.0,))), "weights are"),
    "strange host": (lambda law: Remote("https://example.com/v1", "large", law, 4), "remote_hosts"),
    "no address": (lambda law: Remote("http://[::1", "large", law, 4), "cannot be read"),
    "no plug-in": (lambda law: Plugin("elsewhere"), "unknown kind"),
}


@pytest.mark.parametrize(("spec", "why"), UNABLE.values(), ids=UNABLE)
@pytest.mark.parametrize("policy", ["top1", "mixture"])
def test_an_expert_that_cannot_be_opened_degrades(
    spec: Callable[[str], Spec],
    why: str,
    policy: str,
    make_settings: MakeSettings,
    tmp_path: Path,
    prompts: Mapping[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = make_settings(tmp_path / "home", policy=policy)
    with Collegium.open(settings) as opened, somebody_else(settings) as home, caplog.at_level(logging.ERROR):
        law = home.cards(home.release())["law"]
        unable = replace(law, spec=spec(adapter_of(law)))
        home.registry.publish(cards=[unable], aliases={"law": unable.version}, note="cannot be opened here")
        reply = opened.chat(prompts["law"], sampling=Sampling(max_tokens=2))
        assert opened.chat(prompts["code"], sampling=Sampling(max_tokens=2)).decision.expert == "code"
    assert (reply.decision.domain, reply.decision.reason, reply.mode) == ("law", "degraded", "base")
    assert why in caplog.text


@pytest.mark.parametrize("place", [0, 1])
def test_one_damaged_adapter_of_several_is_never_served(
    place: int, make_settings: MakeSettings, tmp_path: Path, between: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path / "home", policy="mixture")
    with Collegium.open(settings) as opened:
        names = [name for name, _ in opened.route(between).candidates]
    assert set(names) == {"law", "code"}
    with somebody_else(settings) as home:
        flip(home.artifacts.path(adapter_of(home.cards(home.release())[names[place]])) / "adapter_model.safetensors")
    with Collegium.open(settings) as opened, caplog.at_level(logging.ERROR):
        reply = opened.chat(between)
    expected = ("degraded", (("base", 1.0),), "base") if place == 0 else ("routed", ((names[0], 1.0),), "lora")
    assert (reply.decision.reason, reply.decision.candidates, reply.mode) == expected
    assert f"expert {names[place]} cannot serve" in caplog.text


def test_a_release_without_the_fallback_changes_nothing(
    make_settings: MakeSettings, tmp_path: Path, prompts: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path / "home", fallback="law")
    with Collegium.open(settings) as opened, somebody_else(settings) as home, caplog.at_level(logging.ERROR):
        before = opened.chat(prompts["unknown"])
        home.registry.publish(aliases={"law": None}, note="somebody takes the fallback away")
        assert opened.chat(prompts["unknown"]).text == before.text
    assert "The fallback 'law' is not an expert" in caplog.text


def test_a_missing_router_is_said_on_opening(fresh_settings: Settings) -> None:
    with somebody_else(fresh_settings) as home:
        shutil.rmtree(home.artifacts.path(home.release().router))
    with pytest.raises(ArtifactCorrupt) as caught:
        Collegium.open(fresh_settings)
    assert caught.value.hint


def test_experts_of_another_base_model_do_not_answer(
    make_settings: MakeSettings, tiny_base: Path, tmp_path: Path, prompts: Mapping[str, str]
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other-base")
    flip(other / "model.safetensors")
    with Collegium.open(make_settings(tmp_path / "home", base_model=str(other))) as opened:
        decision = opened.chat(prompts["law"]).decision
        assert opened.chat(prompts["unknown"]).decision.reason == "unknown_domain"
    assert (decision.reason, decision.expert) == ("degraded", "base")


def test_an_unknown_fallback_is_said_on_opening(make_settings: MakeSettings, tmp_path: Path) -> None:
    engines = _engines()
    with pytest.raises(UnknownExpert, match="'nobody'") as caught:
        Collegium.open(make_settings(tmp_path / "home", fallback="nobody"))
    assert caught.value.hint
    assert all(name in caught.value.hint for name in ("base", "law", "code"))
    assert _engines() == engines, "an engine was left running"


def test_a_fallback_may_be_an_expert(make_settings: MakeSettings, tmp_path: Path, prompts: Mapping[str, str]) -> None:
    with Collegium.open(make_settings(tmp_path / "home", fallback="law")) as opened:
        decision = opened.chat(prompts["unknown"]).decision
    assert (decision.reason, decision.expert) == ("unknown_domain", "law")


def test_a_release_of_somebody_else_is_picked_up_and_running_answers_go_on(
    running: Collegium, prompts: Mapping[str, str]
) -> None:
    old = running.experts()["law"]
    before = running.chat(prompts["law"], sampling=LONG)
    answer = running.stream(prompts["law"], sampling=LONG)
    next(iter(answer.generation))
    with somebody_else(running.settings) as home:
        new = replace(old, spec=Lora(adapter_of(home.cards(home.release())["code"]), 4))
        first = home.release()
        home.registry.publish(cards=[new], aliases={"law": new.version}, note="trained again")
        after = running.chat(prompts["law"], sampling=LONG)
        assert after.expert_version == new.version
        assert after.text != before.text
        assert running.experts()["law"] == new
        rest = "".join(delta.text for delta in answer)
        assert before.text.endswith(rest)
        assert answer.reply.expert_version == old.version
        home.registry.rollback(first.id)
        assert running.chat(prompts["law"], sampling=LONG).text == before.text
        home.registry.publish(aliases={"law": None}, note="away")
    decision = running.chat(prompts["law"]).decision
    assert (decision.reason, decision.expert) == ("no_expert", "base")


def test_a_release_that_cannot_serve_changes_nothing(
    running: Collegium, prompts: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    before = running.chat(prompts["law"])
    with somebody_else(running.settings) as home, caplog.at_level(logging.ERROR):
        home.registry.publish(router="0" * 64, note="a router that is not there")
        assert running.chat(prompts["law"]).text == before.text
    assert "0" * 64 in caplog.text


@pytest.fixture
def index(fresh_settings: Settings, tmp_path: Path) -> str:
    """The version of an index for `law`, which is live."""
    encoder = Encoder(ModelCache(fresh_settings.home / "models").get(fresh_settings.encoder))
    chunks = chunk(DOCUMENT, size=70, overlap=0)
    assert len(chunks) > 1
    build_index(chunks, encoder.encode, tmp_path / "index", encoder_id=encoder.identity)
    with somebody_else(fresh_settings) as home:
        version = home.artifacts.put(tmp_path / "index")
        home.registry.publish(indexes={"law": version}, note="documents")
    return version


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> list[str]:
    """What the model is given to read, as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompts: list[str] = []
    submit = Engine.submit

    def listening(self: Engine, request: Request) -> Generation:
        prompts.extend(str(tokenizer.decode(list(row.prompt))) for row in request.local)
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", listening)
    return prompts


def test_documents_of_a_domain_are_quoted_and_cited(
    index: str, running: Collegium, prompts: Mapping[str, str], said: list[str]
) -> None:
    reply = running.chat(prompts["law"])
    assert reply.citations
    for passage in reply.citations:
        assert passage.text == DOCUMENT.text[slice(*passage.span)]
        assert (passage.document, passage.index_version) == (DOCUMENT.name, index)
        assert passage.score >= running.settings.passage_score
        assert passage.text in said[-1]
    assert DOCUMENT.name in said[-1]
    assert said[-1].index(reply.citations[0].text) < said[-1].index(prompts["law"])
    plain = running.chat(prompts["law"], retrieve=False)
    assert plain.citations == ()
    assert DOCUMENT.name not in said[-1]
    assert plain.usage.prompt_tokens < reply.usage.prompt_tokens


@pytest.mark.usefixtures("index")
def test_documents_answer_for_an_expert_that_is_asked_for(running: Collegium, prompts: Mapping[str, str]) -> None:
    assert running.chat(prompts["law"], expert="law").citations
    assert not running.chat(prompts["code"]).citations
    assert not running.chat(prompts["law"], expert="code").citations


@pytest.mark.usefixtures("index")
def test_what_follows_up_is_looked_up_with_what_it_follows(
    running: Collegium, prompts: Mapping[str, str], said: list[str]
) -> None:
    turns = [Message("user", prompts["law"]), Message("assistant", "It is."), Message("user", "And why?")]
    reply = running.chat(turns)
    assert reply.decision.reason == "sticky"
    assert [passage.text for passage in reply.citations] == [
        passage.text for passage in running.chat(f"{prompts['law']}\nAnd why?", expert="law").citations
    ]
    first = next(text for text in said if "And why?" in text)
    assert first.index(reply.citations[0].text) < first.index("And why?")


@pytest.mark.usefixtures("index")
def test_documents_serve_a_domain_without_an_expert(running: Collegium, prompts: Mapping[str, str]) -> None:
    with somebody_else(running.settings) as home:
        home.registry.publish(aliases={"law": None}, note="documents alone")
    reply = running.chat(prompts["law"])
    assert (reply.decision.reason, reply.mode) == ("no_expert", "base")
    assert reply.citations


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("change", [{"passages": 0}, {"context_tokens": 0}, {"passage_score": 1.0}])
def test_settings_switch_quoting_off(
    fresh_settings: Settings, prompts: Mapping[str, str], change: Mapping[str, float]
) -> None:
    with Collegium.open(fresh_settings.model_copy(update=dict(change))) as opened:
        assert not opened.chat(prompts["law"]).citations


@pytest.mark.usefixtures("index")
def test_no_more_passages_than_are_wanted(fresh_settings: Settings, prompts: Mapping[str, str]) -> None:
    settings = fresh_settings.model_copy(update={"passages": 1, "passage_score": -1.0})
    with Collegium.open(settings) as opened:
        assert len(opened.chat(prompts["law"]).citations) == 1


@pytest.mark.usefixtures("index")
def test_a_prompt_that_fits_by_itself_is_not_refused_for_its_quotations(
    running: Collegium, prompts: Mapping[str, str]
) -> None:
    prompt = f"{prompts['law']}{' the contract' * 28}"
    turns = [Message("user", prompts["law"]), Message("assistant", "It is."), Message("user", prompt)]
    assert 300 < running.chat(prompt, retrieve=False).usage.prompt_tokens <= 400
    assert running.chat(prompt).usage.prompt_tokens <= 400
    assert running.chat(turns).usage.prompt_tokens <= 400


def test_a_damaged_index_is_said_and_not_quoted(
    index: str, running: Collegium, prompts: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with somebody_else(running.settings) as home, caplog.at_level(logging.ERROR):
        flip(home.artifacts.path(index) / "index.faiss")
        reply = running.chat(prompts["law"])
    assert (reply.citations, reply.mode) == ((), "lora")
    assert index in caplog.text


def _engines() -> int:
    return sum(thread.name == "collegium-engine" for thread in threading.enumerate())
