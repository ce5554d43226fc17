"""An adapter that does not do here what it did where it was measured is not served; all others go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collegium.errors import ArtifactCorrupt
from collegium.experts.artifacts import tree_hash
from collegium.experts.bundle import export_release
from collegium.experts.engine.batch import Decoder
from collegium.experts.engine.canary import MOST_TOKENS, check_canary
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.load import load_decoder
from collegium.experts.engine.lora import read_lora
from collegium.experts.engine.slots import Adapter
from collegium.experts.home import Home
from collegium.experts.probe import make_canary
from collegium.models.cache import CachedModel
from collegium.models.load import Precision, load_tokenizer
from collegium.runtime import Collegium
from collegium.schema import Canary, Card, Lora, Sampling, card_from_dict, card_to_dict
from collegium.settings import Settings
from collegium.tests.engine_doubles import Doubled, collect, is_idle, open_decoder, until
from collegium.tests.engine_models import tiny_lm
from collegium.training.domain import NewDomain
from collegium.training.register import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
SHORT = Sampling(max_tokens=4)
PROMPT = [5, 6, 7]
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> CachedModel:
    return CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")


@pytest.fixture(scope="module")
def canaries(base: CachedModel, adapters: Mapping[str, Path]) -> dict[str, Canary]:
    return {name: make_canary(folder, base) for name, folder in adapters.items()}


@pytest.fixture(scope="module")
def decoders(base: CachedModel) -> Iterator[Mapping[Precision, Decoder]]:
    import torch

    cpu = torch.device("cpu")
    made = {one: load_decoder(base, precision=one, device=cpu, threads=1, cache_bytes=1 << 20) for one in PRECISIONS}
    yield made
    for decoder in made.values():
        decoder.close()


def check(decoder: Decoder, folder: Path, canary: Canary) -> None:
    decoder.load(1, read_lora(folder, "v"))
    check_canary(canary, decoder, 1, "v")


def configured(**changes: Any) -> Change:
    """Change the adapter's configuration, as an engine that misreads it would."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return change


def damaged(folder: Path) -> None:
    """Its last half is in another order."""
    path = folder / "adapter_model.safetensors"
    data = np.fromfile(path, np.float32)  # the header fills whole numbers too
    data[len(data) // 2 :] = data[len(data) // 2 :][::-1].copy()
    data.tofile(path)


def emptied(folder: Path) -> None:
    """A layer is zero."""
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: one * (".layers.1." not in name) for name, one in tensors.items()}, path)


WRONG: dict[str, Change] = {
    "scaled twice": configured(lora_alpha=16),
    "scaled half": configured(lora_alpha=4),
    "stabilised": configured(use_rslora=True),
    "damaged": damaged,
    "emptied": emptied,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["law", "code"])
def test_an_adapter_as_it_was_measured_passes(
    name: str,
    precision: Precision,
    decoders: Mapping[Precision, Decoder],
    adapters: Mapping[str, Path],
    canaries: Mapping[str, Canary],
) -> None:
    check(decoders[precision], adapters[name], canaries[name])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_one_that_is_not_what_was_measured_does_not(
    wrong: str,
    precision: Precision,
    decoders: Mapping[Precision, Decoder],
    adapters: Mapping[str, Path],
    canaries: Mapping[str, Canary],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(adapters["law"], tmp_path / "law")
    WRONG[wrong](folder)
    with pytest.raises(ArtifactCorrupt, match=r"adapter v is off by .* from what its card says.*register it again"):
        check(decoders[precision], folder, canaries["law"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nor_does_another_adapter_or_none(
    precision: Precision,
    decoders: Mapping[Precision, Decoder],
    adapters: Mapping[str, Path],
    canaries: Mapping[str, Canary],
) -> None:
    for loaded, slot in (("code", 1), ("law", 0)):
        decoders[precision].load(1, read_lora(adapters[loaded], "v"))
        with pytest.raises(ArtifactCorrupt, match="adapter v is off by"):
            check_canary(canaries["law"], decoders[precision], slot, "v")


def test_another_base_model_is_told_from_a_wrong_adapter(
    base: CachedModel, canaries: Mapping[str, Canary], tmp_path: Path
) -> None:
    import torch

    vocab = len(load_tokenizer(base))
    other = replace(base, folder=tiny_lm(tmp_path / "other", vocab_size=vocab))
    for precision in PRECISIONS:
        decoder = load_decoder(other, precision=precision, device=torch.device("cpu"), threads=1, cache_bytes=1 << 20)
        with pytest.raises(ArtifactCorrupt, match="The base model is off by"):
            check_canary(canaries["law"], decoder, 1, "v")
        decoder.close()


def test_a_canary_of_another_form_is_refused_before_the_model_reads_it(
    decoders: Mapping[Precision, Decoder], canaries: Mapping[str, Canary]
) -> None:
    good = canaries["law"]
    for bad in (
        replace(good, tokens=good.tokens * (MOST_TOKENS // len(good.tokens) + 1)),
        replace(good, tokens=()),
        replace(good, tokens=(*good.tokens[1:], 1 << 20)),
        replace(good, ids=(-1, *good.ids[1:])),
        replace(good, ids=good.ids[1:]),
        replace(good, base=good.base[1:]),
        replace(good, ids=(), logprobs=(), base=()),
    ):
        with pytest.raises(ArtifactCorrupt, match="canary of the adapter v does not fit"):
            check_canary(bad, decoders["int8"], 1, "v")


def test_numbers_that_are_none_do_not_pass(
    decoders: Mapping[Precision, Decoder], canaries: Mapping[str, Canary]
) -> None:
    good = canaries["law"]
    with pytest.raises(ArtifactCorrupt, match="off by nan"):
        check_canary(replace(good, logprobs=(float("nan"),) * len(good.ids)), decoders["float32"], 0, "v")


@pytest.fixture
def doubled(tiny_base: Path) -> Doubled:
    return Doubled(open_decoder(tiny_base, slots=1))


@pytest.fixture
def engine(doubled: Doubled, base: CachedModel) -> Iterator[Engine]:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(base)
    opened = Engine(doubled, tokenizer)
    yield opened
    opened.close()


def test_it_is_refused_from_the_first_request_on_and_the_others_answer(
    engine: Engine, adapters: Mapping[str, Path], canaries: Mapping[str, Canary], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["law"], tmp_path / "law")
    damaged(folder)
    wrong = Adapter(tree_hash(folder), folder, canaries["law"])
    right = Adapter("code", adapters["code"], canaries["code"])
    for _ in range(3):
        for adapter in (right, None):
            assert collect(engine.generate(PROMPT, adapter=adapter, sampling=SHORT)).reason == "length"
        error = collect(engine.generate(PROMPT, adapter=wrong, sampling=SHORT)).error
        assert isinstance(error, ArtifactCorrupt)
        assert wrong.version[:12] in error.message
    until(lambda: is_idle(engine))
    assert engine.stats().adapters <= 1


def test_it_is_checked_once_a_version(
    engine: Engine, doubled: Doubled, adapters: Mapping[str, Path], canaries: Mapping[str, Canary]
) -> None:
    both = [Adapter(name, adapters[name], canaries[name]) for name in ("law", "code")]
    probe = [len(canaries["law"].tokens)]

    def probes() -> int:
        return sum(counts == probe for counts in doubled.passes)

    for adapter in both * 2:
        collect(engine.generate(PROMPT, adapter=adapter, sampling=SHORT))
    assert doubled.loads == ["law", "code", "law", "code"], "there is one slot"
    assert probes() == 4, "with the adapter and without, for each of two"
    collect(engine.generate(PROMPT, adapter=replace(both[0], version="old", canary=None), sampling=SHORT))
    assert probes() == 4, "a card without a canary says nothing to hold it to"


def test_a_registered_adapter_brings_its_canary_wherever_it_goes(
    fresh_settings: Settings,
    adapters: Mapping[str, Path],
    base: CachedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    with Home(fresh_settings) as home:
        domain = NewDomain("music", "Guitars.", prompts=("the guitar and the violin", "a violin by the river"))
        card = register(home, domain, adapter=adapters["law"], progress=lambda what, done, of: told.append(what))
        assert card.evidence.canary == make_canary(adapters["law"], base)
        assert "probing the adapter" in told
        again = register(home, replace(domain, description="Violins."), progress=lambda what, done, of: None)
        assert (again.evidence.canary, again.version) == (card.evidence.canary, card.version)
        export_release(tmp_path / "release", home.registry, home.artifacts, home.release())
    monkeypatch.setattr("collegium.experts.home.SHIPPED", tmp_path / "release")
    settings = fresh_settings.model_copy(update={"home": tmp_path / "other"})
    with Collegium.open(settings) as there:
        assert there.experts()["music"].evidence.canary == card.evidence.canary
        assert there.chat("a violin", expert="music", sampling=SHORT).mode == "lora"


def test_where_a_card_says_otherwise_the_fallback_answers_in_place_of_that_expert_alone(
    fresh_settings: Settings, base: CachedModel, adapters: Mapping[str, Path]
) -> None:
    with Home(fresh_settings) as home:
        card = home.cards(home.release())["law"]
        wrong = replace(card, evidence=replace(card.evidence, canary=make_canary(adapters["code"], base)))
        assert wrong.version == card.version
        home.registry.publish(cards=[wrong], note="evidence of another")
    with Collegium.open(fresh_settings) as collegium:
        for _ in range(2):
            reply = collegium.chat("explain the contract", expert="law", sampling=SHORT)
            assert (reply.mode, reply.decision.reason) == ("base", "degraded")
        assert collegium.chat("explain the loop", expert="code", sampling=SHORT).mode == "lora"


def test_cards_from_before_there_were_canaries_are_read(fresh_settings: Settings) -> None:
    with Home(fresh_settings) as home:
        body = card_to_dict(home.cards(home.release())["law"])
    old = {**body, "evidence": {name: one for name, one in body["evidence"].items() if name != "canary"}}
    assert card_from_dict(old) == card_from_dict(json.loads(json.dumps(body)))
    assert card_from_dict(old).evidence.canary is None


def _folder(home: Home, card: Card) -> Path:
    assert isinstance(card.spec, Lora)
    return home.artifacts.verify(card.spec.adapter)


@pytest.mark.models
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_that_ship_pass(precision: Precision, real_home: Path) -> None:
    import torch

    with Home(Settings(home=real_home)) as home:
        base = home.models.get(home.settings.base_model)
        decoder = load_decoder(base, precision=precision, device=torch.device("cpu"), cache_bytes=16 << 20)
        cards = {name: card for name, card in home.cards(home.release()).items() if isinstance(card.spec, Lora)}
        assert len(cards) == 5
        folders = {name: _folder(home, card) for name, card in cards.items()}
        for name, card in cards.items():
            canary = card.evidence.canary
            assert canary
            check(decoder, folders[name], canary)
            other = next(one for one in cards if one != name)
            with pytest.raises(ArtifactCorrupt, match="off by"):
                check(decoder, folders[other], canary)
        decoder.close()
