"""A large model that is steered by a small one, both in this process: what the formula says, token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from collegium.errors import ArtifactCorrupt, InvalidRequest, ModelUnavailable, UnsupportedModel
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.dense import DenseDecoder
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.int8 import Int8Decoder
from collegium.experts.home import Home
from collegium.experts.kinds import Expert, Host, LocalExpert, load_adapter, open_expert
from collegium.experts.shrunk import Shrunk
from collegium.runtime import Collegium
from collegium.schema import (
    ARTIFACT,
    Base,
    Card,
    Combination,
    ExpertRequest,
    Message,
    Proxy,
    Sampling,
    card_from_dict,
    card_to_dict,
)
from collegium.service import create_app
from collegium.serving import Serving
from collegium.settings import Settings
from collegium.tests.engine_doubles import MARGIN, collect
from collegium.tests.engine_models import reference
from collegium.tests.test_service import serving

TOKENS = 8
ASKED = ExpertRequest((Message("user", "explain the contract"),), "x", sampling=Sampling(max_tokens=TOKENS, logprobs=1))


@pytest.fixture(scope="module")
def home(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collegium]:
    """A Collegium in float32 with the large model of `large` in its artifacts."""
    settings = make_settings(tmp_path_factory.mktemp("proxy"), precision="float32")
    with Collegium(Serving(settings)) as opened:
        yield opened


@pytest.fixture(scope="module")
def host(home: Collegium) -> Host:
    return home._serving.snapshot().host


@pytest.fixture(scope="module")
def large(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that differs from the base: its second layer alone."""
    folder = tmp_path_factory.mktemp("large")
    Shrunk(host.base, (1,)).save(folder)
    return ARTIFACT + host.artifacts.put(folder)


@pytest.fixture(scope="module")
def law(host: Host, adapters: Mapping[str, Path]) -> str:
    """The content hash of an adapter."""
    return host.artifacts.put(adapters["law"])


def card(law: str, host: Host, *, large: str = "base", **combination: Any) -> Card:
    return Card("steered", "", Proxy(law, 4, large=large, combination=Combination(**combination)), host.base)


def greedy(logits: Callable[[list[int]], Floats], prompt: list[int]) -> list[int]:
    """Greedy tokens of a function from tokens to `[vocab]`."""
    tokens: list[int] = []
    for _ in range(TOKENS):
        found = logits([*prompt, *tokens])
        second, first = np.sort(found)[-2:]
        assert first - second > MARGIN, "take another prompt"
        tokens.append(int(found.argmax()))
    return tokens


def test_it_is_large_plus_alpha_times_what_tuning_changed(
    host: Host, law: str, large: str, tiny_base: Path, adapters: Mapping[str, Path]
) -> None:
    expert = open_expert(card(law, host, large=large, alpha=0.7), host)
    large_folder = host.models.cached(large).folder
    z, tuned, untuned = reference(large_folder), reference(tiny_base, adapters["law"]), reference(tiny_base)
    prompt = host.chat.encode(ASKED.messages)
    by_hand = greedy(lambda ids: z(ids)[-1] + 0.7 * (tuned(ids)[-1] - untuned(ids)[-1]), prompt)
    assert list(collect(expert.start(ASKED)).tokens) == by_hand
    assert expert.mode == "proxy"
    assert by_hand != greedy(lambda ids: z(ids)[-1], prompt)


def test_alpha_0_is_the_large_model_and_alpha_1_on_the_small_one_is_the_expert(
    host: Host, law: str, large: str
) -> None:
    steered = open_expert(card(law, host, large=large, alpha=1.3), host)
    nothing = collect(steered.start(replace(ASKED, alpha=0.0)))
    on_large = collect(open_expert(card(law, host, large=large, alpha=0.0), host).start(ASKED))
    adapter = load_adapter(law, card(law, host), host)
    expert = collect(LocalExpert(host, None, adapter, "lora").start(ASKED))
    on_itself = collect(open_expert(card(law, host, alpha=1.0), host).start(ASKED))
    assert nothing == on_large
    assert nothing.tokens == tuple(
        greedy(lambda ids: reference(host.models.cached(large).folder)(ids)[-1], host.chat.encode(ASKED.messages))
    )
    assert on_itself.tokens == expert.tokens
    assert nothing.tokens != collect(steered.start(ASKED)).tokens


@pytest.mark.parametrize(
    "combination",
    [
        {"method": "proxy", "alpha": 1.5, "alpha_end": 0.2, "fade": 4},
        {"method": "mixture", "alpha": 0.4},
        {"method": "contrastive", "alpha": 0.5},
    ],
)
def test_every_method_answers_the_same_beside_others(
    host: Host, law: str, large: str, combination: dict[str, Any]
) -> None:
    expert = open_expert(card(law, host, large=large, **combination), host)
    base = LocalExpert(host, None, None, "base")
    alone, plain = collect(expert.start(ASKED)), collect(base.start(ASKED))
    assert len(alone.tokens) == TOKENS
    crowd: list[Expert] = [expert, base, expert, base, expert]
    together = [collect(one) for one in [member.start(ASKED) for member in crowd]]
    assert [one.tokens for one in together] == [alone.tokens, plain.tokens] * 2 + [alone.tokens]
    hot = replace(ASKED, seed=3, sampling=replace(ASKED.sampling, temperature=1.2))
    assert collect(expert.start(hot)) == collect(expert.start(hot))


def test_a_prompt_fits_beside_the_other_rows_of_its_model(
    host: Host, law: str, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "room", lambda self, model="base", rows=1: 240 // rows)
    turns = [Message(role, "explain the contract " * 5) for role in ("user", "assistant")] * 5
    asked = replace(ASKED, messages=(*turns, *ASKED.messages))
    alone, beside = (open_expert(card(law, host, large=one), host).start(asked) for one in (large, "base"))
    assert 120 < alone.prompt_tokens <= 240 - TOKENS
    assert beside.prompt_tokens <= 80 - TOKENS
    assert len(collect(alone).tokens) == len(collect(beside).tokens) == TOKENS


def test_it_streams_and_is_cancelled(host: Host, law: str, large: str) -> None:
    expert = open_expert(card(law, host, large=large), host)
    generation = expert.start(replace(ASKED, sampling=Sampling(max_tokens=300)))
    pieces = iter(generation)
    assert next(pieces).token_ids
    generation.close()
    assert [piece.finish_reason for piece in pieces][-1] == "cancelled"
    assert host.engine.stats().running == 0


def test_a_wrong_alpha_is_refused_before_any_token(host: Host, law: str) -> None:
    steered, mixed = (open_expert(card(law, host, method=one, alpha=0.5), host) for one in ("proxy", "mixture"))
    with pytest.raises(InvalidRequest, match="alpha"):
        steered.start(replace(ASKED, alpha=-1.0))
    with pytest.raises(InvalidRequest, match="share"):
        mixed.start(replace(ASKED, alpha=1.5))


def test_another_vocabulary_is_refused_with_the_way_out(host: Host, law: str, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(UnsupportedModel, match="mode text"):
        open_expert(card(law, host, large=str(other)), host)


def test_a_model_that_is_not_the_measured_one_is_refused(host: Host, law: str, tiny_base: Path) -> None:
    spec = Proxy(law, 4, large=str(tiny_base), identities={str(tiny_base): "Llama:another"})
    with pytest.raises(ArtifactCorrupt, match="was Llama:another where"):
        open_expert(Card("steered", "", spec, host.base), host)


def test_nor_is_one_that_another_card_has_opened(host: Host, law: str, tiny_base: Path, tmp_path: Path) -> None:
    copy = str(shutil.copytree(tiny_base, tmp_path / "copy"))
    open_expert(card(law, host, large=copy), host)
    spec = Proxy(law, 4, large=copy, identities={copy: "Llama:another"})
    with pytest.raises(ArtifactCorrupt, match="was Llama:another where"):
        open_expert(Card("steered", "", spec, host.base), host)


def test_a_model_that_comes_after_the_end_is_freed(
    fresh_settings: Settings, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = str(shutil.copytree(tiny_base, tmp_path / "copy"))
    closed: list[object] = []
    with Collegium.open(fresh_settings) as opened:
        models = opened._serving.snapshot().host.models
    for decoder in (Int8Decoder, DenseDecoder):
        monkeypatch.setattr(decoder, "close", lambda self: closed.append(type(self)))
    with pytest.raises(ModelUnavailable, match="engine is closed"):
        models.open(copy)
    assert len(closed) == 1


def test_a_model_that_is_missing_is_not_looked_for_at_every_request(
    host: Host, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    late.mkdir()
    with pytest.raises(ModelUnavailable, match="no safetensors") as first:
        host.models.open(str(late))
    shutil.copytree(tiny_base, late, dirs_exist_ok=True)
    with pytest.raises(ModelUnavailable, match="no safetensors") as again:
        host.models.open(str(late))
    assert (str(first.value), first.type) == (str(again.value), again.type)
    monkeypatch.setattr("collegium.experts.pool.AGAIN", 0.0)
    assert host.models.open(str(late)).name == str(late)


def test_a_card_keeps_its_combination_and_its_artifacts(host: Host, law: str, large: str) -> None:
    before = card(law, host, large=large, method="comblm", weights=(0.5, -1.0))
    after = card_from_dict(json.loads(json.dumps(card_to_dict(before))))
    assert (after, after.version) == (before, before.version)
    assert after.spec.artifacts == (law, large.removeprefix(ARTIFACT))
    assert after.version != card(law, host, large=large, method="comblm", weights=(0.5, -1.1)).version


def test_it_is_asked_by_name_with_an_alpha_of_the_request(home: Collegium, host: Host, law: str, large: str) -> None:
    steered = card(law, host, large=large, alpha=1.3)
    with Home(home.settings) as opened:
        opened.registry.publish(cards=[steered], aliases={"steered": steered.version}, note="a proxied expert")
    reply = home.chat("explain the contract", expert="steered")
    without = home.chat("explain the contract", expert="steered", alpha=0)
    assert (reply.mode, reply.expert_version, reply.paid) == ("proxy", steered.version, None)
    assert without.text != reply.text
    with serving(create_app(collegium=home)) as url, httpx.Client(base_url=url, timeout=30) as client:

        def ask(**options: object) -> httpx.Response:
            messages = [{"role": "user", "content": "explain the contract"}]
            body = {"model": "steered", "messages": messages, "collegium": options}
            return client.post("/v1/chat/completions", json=body)

        assert ask().json()["choices"][0]["message"]["content"] == reply.text
        zero = ask(alpha=0).json()
        assert zero["choices"][0]["message"]["content"] == without.text
        assert (zero["collegium"]["mode"], zero["collegium"]["paid"]) == ("proxy", None)
        refused = ask(alpha=-1)
        assert refused.status_code == 400
        assert "alpha" in refused.json()["error"]["message"]
    assert Card("base", "", Base(), host.base).spec.artifacts == ()
