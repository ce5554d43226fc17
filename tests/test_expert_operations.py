"""An expert's life after it is live: back and forth between versions, checked, compared, exported and imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, GateRefused, InvalidRequest, NameTaken, UnknownExpert, UnsupportedModel
from collegium.experts.differences import base_norms, compare, difference
from collegium.experts.engine.lora import LoraWeights, read_lora
from collegium.experts.home import Home
from collegium.experts.portable import base_name, export_expert
from collegium.experts.probe import make_canary
from collegium.models.cache import CachedModel
from collegium.runtime import Collegium
from collegium.schema import Card, Evidence, Lora, Proxy, Score
from collegium.settings import DEFAULT_BASE, Settings
from collegium.tests.engine_models import reference, tiny_lm, tiny_lora
from collegium.training import importing
from collegium.training.domain import NewDomain
from collegium.training.importing import Import, Result, import_expert
from collegium.training.register import register, unregister
from collegium.training.verify import Checked, verify
from collegium.training.versions import retire, rollback

PROMPTS = ("the guitar and the violin", "a violin by the river", "is the guitar a violin")
SCORE = Score("t", "accuracy", 0.9, 0.8, 1.0, 0.5, 9, {"live": 0.6})
EVIDENCE = Evidence(
    "Contracts | clauses.", (SCORE,), "better: +0.4", recipe={"name": "lora-sft", "rank": 4}, data={"a.jsonl": "0" * 64}
)


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def home(fresh_settings: Settings) -> Iterator[Home]:
    with Home(fresh_settings) as opened:
        yield opened


@pytest.fixture
def base(home: Home) -> CachedModel:
    return home.models.get(home.settings.base_model)


def again(home: Home, adapter: Path, name: str = "law") -> Card:
    """Another version of an expert, live."""
    return register(home, NewDomain(name), adapter=adapter, evidence=EVIDENCE, progress=silent)


def test_a_running_service_follows_each_step_back(
    home: Home, fresh_settings: Settings, adapters: Mapping[str, Path], prompts: Mapping[str, str]
) -> None:
    with Collegium.open(fresh_settings) as running:
        first, old = home.release().aliases["law"], running.chat(prompts["law"]).text
        second = again(home, adapters["code"]).version
        music = register(home, NewDomain("music", prompts=PROMPTS), progress=silent)  # it stays
        before = home.release()
        assert running.chat(prompts["law"]).expert_version == second
        card, release = rollback(home, "law")
        assert (card.version, release.parent) == (first, before.id)
        assert release.aliases == {**before.aliases, "law": first}
        assert (release.router, release.indexes) == (before.router, before.indexes)
        reply = running.chat(prompts["law"])
        assert (reply.expert_version, reply.text, reply.decision.reason) == (first, old, "routed")
        assert running.chat(PROMPTS[0]).expert_version == music.version
        assert rollback(home, "law")[0].version == second, "twice is back again"
        retired = retire(home, "law")
        decision = running.route(prompts["law"])
        assert (decision.domain, decision.reason, decision.expert) == ("law", "no_expert", "base")
        assert retired.router == before.router
        assert rollback(home, "law", first[:10])[0].version == first
        assert running.chat(prompts["law"]).text == old


def test_what_is_retired_comes_back_as_it_was_last(home: Home, adapters: Mapping[str, Path]) -> None:
    second = again(home, adapters["code"]).version
    retire(home, "law")
    assert rollback(home, "law")[0].version == second


def test_a_retired_domain_keeps_class_and_documents_and_a_removed_one_neither(home: Home, tmp_path: Path) -> None:
    (tmp_path / "song.txt").write_text("The guitar and the violin by the river.", "utf-8")
    card = register(home, NewDomain("music", docs=(tmp_path / "song.txt",)), progress=silent)
    before = home.release()
    after = retire(home, "music")
    assert (after.router, after.indexes) == (before.router, before.indexes)
    assert rollback(home, "music")[0] == card
    removed = unregister(home, "music")
    assert removed.router != before.router
    assert "music" not in removed.indexes
    with pytest.raises(InvalidRequest, match="The router does not know the domain music") as caught:
        rollback(home, "music")
    assert caught.value.hint
    assert f"releases rollback {removed.parent}" in caught.value.hint


def test_removing_takes_the_documents_of_a_shipped_domain_and_leaves_its_class(home: Home, tmp_path: Path) -> None:
    (tmp_path / "law.txt").write_text("A contract.", "utf-8")
    register(home, NewDomain("law", docs=(tmp_path / "law.txt",)), progress=silent)
    before = home.release()
    after = unregister(home, "law")
    assert (after.router, "law" in after.indexes) == (before.router, False)


def test_what_cannot_be_rolled_back_is_said_and_nothing_published(home: Home, adapters: Mapping[str, Path]) -> None:
    first, code = home.release().aliases["law"], home.release().aliases["code"]
    with pytest.raises(InvalidRequest, match="No other version of law was live before") as caught:
        rollback(home, "law")
    assert first in str(caught.value)
    before = home.release()
    for name, version, error, said in (
        ("tax", "", UnknownExpert, "no expert 'tax'"),
        ("law", "law@0123456789", UnknownExpert, "No expert has the version"),
        ("law", code, InvalidRequest, f"{code} is no version of law"),
        ("law", first, InvalidRequest, "is live already"),
        ("base", "", InvalidRequest, "base"),
    ):
        with pytest.raises(error, match=said):
            rollback(home, name, version)
    for name, error in (("tax", UnknownExpert), ("base", InvalidRequest)):
        with pytest.raises(error):
            retire(home, name)
    other = replace(home.registry.card(first), base="LlamaForCausalLM:other")
    damaged = again(home, adapters["code"], "math")
    again(home, adapters["law"], "math")
    home.registry.publish(cards=[other], note="of another base")
    with pytest.raises(InvalidRequest, match=r"is of the base model LlamaForCausalLM:other"):
        rollback(home, "law", other.version)
    assert isinstance(damaged.spec, Lora)
    shutil.rmtree(home.artifacts.path(damaged.spec.adapter))
    live = home.release()
    with pytest.raises(ArtifactCorrupt):
        rollback(home, "math")
    assert home.release() == live != before


def test_a_domain_that_another_took_is_not_taken_back(home: Home, adapters: Mapping[str, Path]) -> None:
    retire(home, "law")
    register(home, NewDomain("law"), name="barrister", adapter=adapters["code"], progress=silent)
    with pytest.raises(NameTaken, match="barrister answers for law") as caught:
        rollback(home, "law")
    assert caught.value.hint == "Retire barrister first."


def by_name(checked: tuple[Checked, ...]) -> dict[str, Checked]:
    return {one.name.partition("@")[0].partition("/")[0]: one for one in checked}


def test_all_that_is_live_is_verified(home: Home, adapters: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The guitar and the violin by the river.", "utf-8")
    register(home, NewDomain("music", docs=(tmp_path / "a.txt",)), progress=silent)
    law = again(home, adapters["law"])
    assert isinstance(law.spec, Lora)
    steered = replace(law, name="steered", domain="", spec=Proxy(law.spec.adapter, 4))
    home.registry.publish(cards=[steered], aliases={"steered": steered.version}, note="steered")
    checked = verify(home, (), silent)
    assert [one.problem for one in checked] == [""] * len(checked)
    whats = {one.name: [check.what for check in one.checks] for one in checked}
    assert whats[law.version] == whats[steered.version] == ["card", "files", "tensors", "canary"]
    assert whats[f"music/{home.release().indexes['music'][:12]}"] == ["files", "tensors", "canary"]
    assert whats[home.release().router[:12]] == ["files", "tensors"]
    assert [one.kind for one in verify(home, ("music",), silent)] == ["base", "index"]


def test_each_kind_of_damage_is_found(
    home: Home, base: CachedModel, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("The guitar and the violin by the river.", "utf-8")
    register(home, NewDomain("music", docs=(tmp_path / "a.txt",)), progress=silent)
    law = again(home, adapters["law"])
    lying = replace(law, evidence=replace(law.evidence, canary=make_canary(adapters["code"], base)))
    wide = tiny_lora(tmp_path / "wide", tiny_lm(tmp_path / "other", hidden_size=64))
    spoilt = _spoilt(adapters["law"], tmp_path / "spoilt")
    others = [
        Card(name, "", Lora(home.artifacts.put(folder), 4), law.base)
        for name, folder in (("wide", wide), ("spoilt", spoilt))
    ]
    foreign = Card("foreign", "", Lora(others[0].spec.artifacts[0], 4), "LlamaForCausalLM:other")
    cards = [lying, *others, foreign]
    home.registry.publish(cards=cards, aliases={card.name: card.version for card in cards}, note="wrong")
    for version in (home.release().indexes["music"], home.release().router):
        path = next(path for path in home.artifacts.path(version).iterdir() if path.is_file())
        path.write_bytes(path.read_bytes() + b" ")
    found = by_name(verify(home, (), silent))
    assert "off by" in found["law"].problem
    assert "does not fit the model" in found["wide"].problem
    assert "not finite" in found["spoilt"].problem
    assert "was measured on the base model LlamaForCausalLM:other" in found["foreign"].problem
    assert "has changed" in found["music"].problem or "has changed" in found[home.release().router[:12]].problem
    assert sum(bool(one.problem) for one in found.values()) == 5 + (found["music"].problem != "")
    assert not found["code"].problem


def _spoilt(source: Path, folder: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@hypothesis.settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_deltas_are_compared_as_whole_matrices_would_be(seed: int, one_rank: int, other_rank: int) -> None:
    import torch

    torch.manual_seed(seed)
    modules = [(0, "q_proj"), (1, "up_proj")]
    made = [{key: (torch.randn(rank, 6), torch.randn(5, rank)) for key in modules} for rank in (one_rank, other_rank)]
    found = compare(LoraWeights("a", one_rank, made[0]), LoraWeights("b", other_rank, made[1]), lambda module: 1.0)
    first, second = ({key: (b @ a).double() for key, (a, b) in each.items()} for each in made)
    for row in found.modules:
        key = next(key for key in modules if row.module == f"layers.{key[0]}.{key[1]}")
        expected = (second[key] - first[key]).norm() / first[key].norm()
        assert row.change == pytest.approx(float(expected), rel=1e-3)
        assert row.cosine == pytest.approx(
            float(torch.cosine_similarity(first[key].flatten(), second[key].flatten(), 0)), abs=1e-4
        )
    one, other = (torch.cat([each[key].flatten() for key in modules]) for each in (first, second))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(one, other, 0)), abs=1e-4)
    assert [row.change for row in found.modules] == sorted((row.change for row in found.modules), reverse=True)


def test_versions_are_compared(home: Home, base: CachedModel, adapters: Mapping[str, Path]) -> None:
    law = home.cards(home.release())["law"]
    other, plain = again(home, adapters["code"]), home.cards(home.release())["base"]
    norms = base_norms(base)
    same = difference(law, law, home.artifacts, norms)
    assert same.deltas
    assert same.deltas.change == pytest.approx(0, abs=1e-6)
    assert same.deltas.cosine == pytest.approx(1)
    changed = difference(law, other, home.artifacts, norms)
    facts = {name: values for name, *values in changed.facts()}
    assert changed.deltas
    assert changed.deltas.change > 0.5
    assert facts["version"] == [law.version, other.version]
    assert facts["recipe.rank"] == ["", "4"]
    assert facts["data.a.jsonl"] == ["", "0" * 64]
    beside = difference(plain, law, home.artifacts, norms)
    assert beside.deltas
    assert (beside.deltas.cosine, beside.deltas.against) == (None, "the base model's weights")
    assert difference(plain, plain, home.artifacts, norms).why == "neither has an adapter"


def test_an_exported_expert_is_peft_s_and_comes_back_as_the_same_version(
    home: Home, base: CachedModel, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    import yaml

    card = again(home, adapters["code"])
    folder = tmp_path / "out"
    export_expert(card, folder, home.artifacts, base, gguf=True)
    export_expert(card, folder, home.artifacts, base)  # replaced
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "card.json"
    ]  # fmt: skip
    tokens = [5, 6, 7, 8]
    np.testing.assert_array_equal(
        reference(base.folder, folder)(tokens), reference(base.folder, adapters["code"])(tokens)
    )
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == base_name(base) == base.folder.name
    _, front, page = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": base.folder.name, "library_name": "peft", "license": "unknown",
        "pipeline_tag": "text-generation", "tags": ["lora", "collegium", "law"], "base_model_relation": "adapter",
    }  # fmt: skip
    assert "| t | accuracy | 0.900 | 0.800 to 1.000 | 0.500 | 0.600 | 9 |" in page
    assert "0" * 64 in page
    retire(home, "law")
    back = import_expert(Import(str(folder), "law", force=True), home, silent)
    assert back.version == card.version == home.release().aliases["law"]
    assert back == card, "what was measured of it here is not forgotten"
    other = import_expert(Import(str(folder), "tort", force=True), home, silent)
    assert (other.spec, other.evidence.forced, other.evidence.gate) == (card.spec, True, "not measured")
    assert other.evidence.recipe["source"] == "folder out"
    assert other.evidence.recipe["trained"] == dict(card.evidence.recipe)
    assert (other.evidence.scores, other.evidence.canary) == ((), card.evidence.canary)
    assert not list(home.root.glob(".import-*"))


def test_what_cannot_be_exported_is_said(home: Home, base: CachedModel, tmp_path: Path) -> None:
    cards = home.cards(home.release())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", "utf-8")
    for card, folder, said in (
        (cards["base"], tmp_path / "out", "answers with the base model as it is"),
        (replace(cards["law"], spec=Proxy("0" * 64, 4)), tmp_path / "out", "is of the kind proxy"),
        (replace(cards["law"], base="other"), tmp_path / "out", "is of the base model other"),
        (cards["law"], tmp_path / "full", "holds something else"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            export_expert(card, folder, home.artifacts, base)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text("utf-8") == "mine"
    assert base_name(replace(base, name=DEFAULT_BASE)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name(replace(base, name="hf:org/model@main")) == "org/model"


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    file = tmp_path / "songs.jsonl"
    file.write_text("".join(json.dumps({"prompt": one, "answer": "yes"}) + "\n" for one in PROMPTS), "utf-8")
    return file


def test_an_import_is_measured_by_the_gate(
    home: Home, adapters: Mapping[str, Path], songs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measured(passed: bool) -> None:
        def measure(domain: str, rows: Any, base: Any, who: Any, *_: Any) -> Result:
            asked.append({"domain": domain, "rows": len(rows), "who": dict(who)})
            return Result("better: +0.1" if passed else "not better: -0.1", passed, (SCORE,))

        monkeypatch.setattr(importing, "measure_import", measure)

    plan = Import(str(adapters["code"]), "law", test=(songs,), description="Songs.")
    before = home.release()
    with pytest.raises(InvalidRequest, match="Nothing says how good law is"):
        import_expert(replace(plan, test=()), home, silent)
    measured(False)
    with pytest.raises(GateRefused, match=r"law is not better: -0.1"):
        import_expert(plan, home, silent)
    assert home.release() == before
    measured(True)
    card = import_expert(plan, home, silent)
    assert (card.evidence.gate, card.evidence.forced, card.evidence.scores) == ("better: +0.1", False, (SCORE,))
    assert card.evidence.data.keys() == {f"{songs.parent.name}/songs.jsonl"}
    assert home.release().parent == before.id
    assert set(asked[0]["who"]) == {"candidate", "base", "live"}
    new = import_expert(replace(plan, name="music", domain="music"), home, silent)
    assert set(asked[-1]["who"]) == {"candidate", "base"}
    assert (new.domain, asked[-1]["rows"]) == ("music", len(PROMPTS))
    again = import_expert(plan, home, silent)
    assert again.version == card.version
    assert set(asked[-1]["who"]) == {"candidate", "base"}, "it is not held against itself"


def test_what_is_no_adapter_for_the_engine_is_refused_before_it_is_measured(
    home: Home, adapters: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(name: str, **config: Any) -> Path:
        folder = shutil.copytree(adapters["law"], tmp_path / name)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
        return folder

    pickled = changed("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    odd = changed("odd")
    (odd / "card.json").write_text("[]", "utf-8")
    wide = tiny_lora(tmp_path / "wide", tiny_lm(tmp_path / "other", hidden_size=64))
    wrong: list[tuple[str | Path, type[Exception], str]] = [
        ("nowhere", InvalidRequest, "'nowhere' is not where an adapter can be"),
        (tmp_path, InvalidRequest, "has no adapter_config.json"),
        (pickled, UnsupportedModel, r"adapter_model\.bin and no adapter_model\.safetensors"),
        (changed("kind", peft_type="IA3"), UnsupportedModel, "of the type IA3"),
        (changed("dora", use_dora=True), UnsupportedModel, "use_dora"),
        (wide, UnsupportedModel, "the base model needs"),
        (_spoilt(adapters["law"], tmp_path / "spoilt"), InvalidRequest, "not finite"),
        (odd, InvalidRequest, r"card\.json is not the card"),
    ]
    before, stored = home.release(), sorted(path.name for path in home.artifacts.root.iterdir())
    for source, error, said in wrong:
        with pytest.raises(error, match=said):
            import_expert(Import(str(source), "music", description="x", force=True), home, silent)
    monkeypatch.setattr(importing, "MOST_BYTES", 10)
    with pytest.raises(InvalidRequest, match="An adapter has at most"):
        import_expert(Import(str(adapters["law"]), "music", description="x", force=True), home, silent)
    assert home.release() == before
    assert sorted(path.name for path in home.artifacts.root.iterdir()) == stored
    assert not list(home.root.glob(".import-*"))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}}])
def test_a_gguf_holds_what_the_engine_adds(architecture: str, config: Mapping[str, Any], tmp_path: Path) -> None:
    from gguf import GGUFReader

    from collegium.experts.lora_gguf import LINEARS, write_lora_gguf

    model = tiny_lm(tmp_path / "base", architecture)
    adapter = tiny_lora(tmp_path / "adapter", model, **config)
    alpha = float(config.get("lora_alpha", 8))
    write_lora_gguf(adapter, model, tmp_path / "a.gguf", name="x", alpha=alpha)
    reader = GGUFReader(tmp_path / "a.gguf")
    for name, expected in (("general.type", "adapter"), ("adapter.type", "lora"), ("adapter.lora.alpha", alpha)):
        field = reader.get_field(name)
        assert field
        assert field.contents() == expected
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = read_lora(adapter, "x")
    assert len(tensors) == 2 * len(weights.modules)
    for (layer, linear), (a, b) in weights.modules.items():
        name = f"blk.{layer}.{LINEARS[linear]}.weight"
        added = alpha / len(a) * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        heads = {"q_proj": 4, "k_proj": 2}.get(linear) if architecture == "LlamaForCausalLM" else None
        if heads:  # neighbours to halves
            added = added.reshape(heads, -1, 2, added.shape[1]).swapaxes(1, 2).reshape(added.shape)
        np.testing.assert_allclose(added, (b @ a).numpy(), rtol=1e-4, atol=1e-5)
