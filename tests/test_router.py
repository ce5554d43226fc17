from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, InvalidRequest, NameTaken, UnknownDomain
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.encoder import Encoder, TorchForward
from collegium.router.artifact import RouterArtifact
from collegium.router.encoder import Encoders
from collegium.router.head import Floats, Head
from collegium.router.router import REMEMBERED, Router
from collegium.router.rows import BACKGROUND, Rows
from collegium.tests.encoder_models import tiny_encoder_lora

SHAPES = ["the {0} and the {1}", "explain the {0} of the {1}", "is a {0} a {1}"]
COOKING, MUSIC = (
    [shape.format(one, other) for shape in SHAPES for one in words for other in words if one != other]
    for words in (("banana", "soup", "kitchen", "recipe"), ("guitar", "violin", "river"))
)


@pytest.fixture(scope="module")
def model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_encoder))


@pytest.fixture(scope="module")
def encoders(model: CachedModel) -> Encoders:
    return Encoders(model, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def artifact(tiny_bundle: Path) -> RouterArtifact:
    release = json.loads((tiny_bundle / "release.json").read_text())
    return RouterArtifact.load(tiny_bundle / "artifacts" / release["router"])


@pytest.fixture(scope="module")
def router(artifact: RouterArtifact, encoders: Encoders) -> Router:
    return Router(artifact, encoders, "v1")


@pytest.fixture(scope="module")
def tuned(
    artifact: RouterArtifact, encoders: Encoders, model: CachedModel, tmp_path_factory: pytest.TempPathFactory
) -> RouterArtifact:
    """A router whose encoder has an adapter."""
    adapter = tiny_encoder_lora(tmp_path_factory.mktemp("adapter"), model)
    return replace(artifact, encoder=encoders.identity(adapter), adapter=adapter)


def test_a_prompt_is_scored_over_all_domains(router: Router, prompts: Mapping[str, str]) -> None:
    scores = router.scores([prompts[domain] for domain in router.domains])
    assert [one.domain for one in scores] == ["code", "health", "law", "math"] == list(router.domains)
    for one in scores:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.known
        assert one.threshold <= one.confidence <= 1
        assert one.prediction_set == (one.domain,)
        assert one.router_version == "v1"
        assert one.embedding.shape == (32,)
    assert not router.scores([prompts["unknown"]])[0].known


def test_no_texts_have_no_scores(router: Router) -> None:
    assert router.scores([]) == []


def test_only_the_domains_that_are_asked_for_are_weighed(router: Router, prompts: Mapping[str, str]) -> None:
    whole, some = (router.scores([prompts["law"]], domains=which)[0] for which in (None, ["math", "code"]))
    assert set(some.probabilities) == {"math", "code"}
    assert sum(some.probabilities.values()) == pytest.approx(1)
    odds = whole.probabilities["math"] / whole.probabilities["code"]
    assert some.probabilities["math"] / some.probabilities["code"] == pytest.approx(odds)
    assert some.confidence == whole.confidence  # whether any domain fits is asked of all of them
    with pytest.raises(UnknownDomain, match="No domain tax") as caught:
        router.scores(["x"], domains=["law", "tax"])
    assert caught.value.hint == "Known domains: code, health, law, math."


def test_domains_that_are_out_of_the_question_are_weighed_too(
    artifact: RouterArtifact, encoders: Encoders, prompts: Mapping[str, str]
) -> None:
    sharp = Router(replace(artifact, head=replace(artifact.head, temperature=0.001)), encoders)
    scores = sharp.scores([prompts["law"]], domains=["math", "code"])[0]
    assert sum(scores.probabilities.values()) == pytest.approx(1)


def test_no_domains_to_weigh_are_refused(router: Router) -> None:
    with pytest.raises(InvalidRequest):
        router.scores(["x"], domains=[])


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1), min_size=1), st.floats(0.01, 0.9))
def test_a_prediction_set_has_what_is_likely_enough(numbers: Mapping[str, float], least: float) -> None:
    probabilities = {name: number / sum(numbers.values()) for name, number in numbers.items()}
    chosen = Head((), np.zeros((0, 1), np.float32), np.zeros(0, np.float32), least=least).prediction_set(probabilities)
    inside = [probabilities[name] for name in chosen]
    assert inside == sorted(probabilities.values(), reverse=True)[: len(chosen)]
    assert all(one >= least for one in inside[1:])
    assert all(probability < least for name, probability in probabilities.items() if name not in chosen)


def test_a_domain_is_learned_from_examples(router: Router, encoders: Encoders, prompts: Mapping[str, str]) -> None:
    learned = Router(router.add_domain("cooking", COOKING), encoders)
    assert learned.domains == ("code", "cooking", "health", "law", "math")
    scores = learned.scores(["explain the soup and the banana"])[0]
    assert (scores.domain, scores.known) == ("cooking", True)
    assert not router.scores(["explain the soup and the banana"])[0].known
    for domain in router.domains:
        assert learned.scores([prompts[domain]])[0].domain == domain
    assert "cooking" not in router.domains


def test_a_domain_is_learned_from_a_description_alone(
    router: Router, encoders: Encoders, prompts: Mapping[str, str]
) -> None:
    learned = Router(router.add_domain("kitchen", description="soup and banana recipe"), encoders)
    assert learned.scores(["a banana soup recipe"])[0].domain == "kitchen"
    assert [learned.scores([prompts[domain]])[0].domain for domain in router.domains] == list(router.domains)


def weights_of(artifact: RouterArtifact) -> dict[str, tuple[bytes, bytes]]:
    """Each domain's weights and bias, bit for bit."""
    head = artifact.head
    return {
        domain: (weights.tobytes(), bias.tobytes())
        for domain, weights, bias in zip(head.domains, head.weights, head.bias, strict=True)
    }


@pytest.mark.parametrize("name", ["aaa", "cooking", "zzz"])
def test_what_is_known_stays_bit_for_bit(
    router: Router, artifact: RouterArtifact, encoders: Encoders, name: str
) -> None:
    learned = router.add_domain(name, COOKING)
    assert learned.head.domains == tuple(sorted((*router.domains, name)))
    assert {domain: bits for domain, bits in weights_of(learned).items() if domain != name} == weights_of(artifact)
    forgotten = Router(learned, encoders).remove_domain(name)
    assert weights_of(forgotten) == weights_of(artifact)
    assert forgotten.rows.ids == artifact.rows.ids
    np.testing.assert_array_equal(forgotten.rows.embeddings, artifact.rows.embeddings)


def test_two_domains_are_learned_one_after_the_other_and_forgotten(router: Router, encoders: Encoders) -> None:
    first = Router(router.add_domain("cooking", COOKING), encoders)
    both = Router(first.add_domain("music", MUSIC), encoders)
    assert both.scores(["explain the guitar"])[0].domain == "music"
    assert both.scores(["a recipe"])[0].domain == "cooking"
    after = both.remove_domain("music")
    assert after.head.domains == first.domains
    assert weights_of(after) == weights_of(first.artifact)
    assert set(after.rows.domains) == set(first.domains)


def test_what_is_learned_keeps_calibration_and_provenance(router: Router, artifact: RouterArtifact) -> None:
    learned = router.add_domain("cooking", [*COOKING, f" {COOKING[0]} ", "", "  "])
    assert learned.head.to_dict() == artifact.head.to_dict() | {"domains": list(learned.head.domains)}
    assert (learned.open_set, learned.threshold) == (artifact.open_set, artifact.threshold)
    assert (learned.provenance, learned.encoder) == (artifact.provenance, artifact.encoder)


def test_texts_are_kept_of_a_users_own_domains_alone(router: Router, encoders: Encoders, tmp_path: Path) -> None:
    learned = router.add_domain("cooking", [*COOKING, f" {COOKING[0]} ", "", "  "])
    learned.save(tmp_path)
    rows = RouterArtifact.load(tmp_path).rows
    assert [text for text in rows.texts if text is not None] == COOKING
    assert {domain for domain, text in zip(rows.domains, rows.texts, strict=True) if text is not None} == {"cooking"}
    assert set(rows.sources[-len(COOKING) :]) == {"user:cooking"}
    assert len(set(rows.ids)) == len(rows)
    described = Router(learned, encoders).add_domain("music", MUSIC, "guitars and violins").rows
    texts = [text for domain, text in zip(described.domains, described.texts, strict=True) if domain == "music"]
    assert texts[: len(MUSIC)] == MUSIC
    assert "guitars and violins" in texts


def test_a_refit_lets_all_domains_settle(router: Router, encoders: Encoders, prompts: Mapping[str, str]) -> None:
    learned = router.add_domain("cooking", COOKING)
    again = learned.refitted()
    assert again.head.to_dict() == learned.head.to_dict()
    assert (again.rows, again.open_set) == (learned.rows, learned.open_set)
    assert all(weights_of(again)[name] != weights_of(learned)[name] for name in learned.head.domains)
    scores = Router(again, encoders).scores([*(prompts[name] for name in router.domains), *COOKING])
    assert [one.domain for one in scores] == [*router.domains, *["cooking"] * len(COOKING)]
    assert weights_of(again.refitted()) == weights_of(again)


def test_domains_that_cannot_be_learned_are_refused(router: Router) -> None:
    with pytest.raises(NameTaken, match="'law'"):
        router.add_domain("law", COOKING)
    with pytest.raises(InvalidRequest, match="what 'cooking' is about") as caught:
        router.add_domain("cooking", [" "], description=" ")
    assert caught.value.hint


def test_domains_that_cannot_be_forgotten_are_refused(router: Router, encoders: Encoders) -> None:
    with pytest.raises(UnknownDomain, match="'tax'") as caught:
        router.remove_domain("tax")
    assert caught.value.hint == "Known domains: code, health, law, math."
    pair = Router(Router(router.remove_domain("code"), encoders).remove_domain("math"), encoders)
    assert pair.domains == ("health", "law")
    with pytest.raises(InvalidRequest, match="two domains"):
        pair.remove_domain("law")


def test_two_domains_are_told_apart_too(router: Router, encoders: Encoders, prompts: Mapping[str, str]) -> None:
    pair = Router(Router(router.remove_domain("code"), encoders).remove_domain("math"), encoders)
    for one in (pair, Router(pair.artifact.refitted(), encoders)):
        assert [each.domain for each in one.scores([prompts["health"], prompts["law"]])] == ["health", "law"]


def test_an_explanation_shows_what_a_score_rests_on(
    router: Router, encoders: Encoders, prompts: Mapping[str, str]
) -> None:
    learned = Router(router.add_domain("cooking", COOKING), encoders, "v2")
    found = learned.explain(COOKING[1])
    assert found.scores.probabilities == learned.scores([COOKING[1]])[0].probabilities
    assert found.scores.router_version == "v2"
    assert next(iter(found.nearest)) == "cooking"
    assert set(found.nearest) == set(learned.domains)
    best = found.nearest["cooking"][0]
    assert (best.source, best.text) == ("user:cooking", COOKING[1])
    assert best.cosine == pytest.approx(1, abs=1e-5)
    for near in found.nearest.values():
        assert 1 <= len(near) <= 3
        assert [one.cosine for one in near] == sorted((one.cosine for one in near), reverse=True)
    assert {one.text for domain in router.domains for one in found.nearest[domain]} == {None}
    assert found.views[1] == max(one.cosine for near in found.nearest.values() for one in near)
    assert len(found.views) == len(found.typical) == 3
    strange = router.explain(prompts["unknown"])
    assert not strange.scores.known
    assert sum(strange.views) < sum(strange.typical)


def test_an_explanation_shows_the_background_too(artifact: RouterArtifact, encoders: Encoders) -> None:
    embedding = encoders.get(None).encode(["banana banana"])
    nothing = Rows(embedding, (BACKGROUND,), ("made-up",), ("b1",), (None,))
    found = Router(replace(artifact, rows=artifact.rows.plus(nothing)), encoders).explain("banana banana")
    assert [one.id for one in found.nearest[BACKGROUND]] == ["b1"]
    assert BACKGROUND not in found.scores.probabilities
    assert not found.scores.known


class Counting:
    """A forward that counts the texts it is given."""

    def __init__(self, model: CachedModel) -> None:
        self._forward = TorchForward(model)
        self.dimension = self._forward.dimension
        self.texts = 0

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> Floats:
        self.texts += len(ids)
        return self._forward(ids, mask)


def test_recent_embeddings_are_remembered(
    artifact: RouterArtifact, encoders: Encoders, model: CachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.router.router.REMEMBERED", 3)
    counting = Counting(model)
    router = Router(artifact, encoders)
    router._encoder = Encoder(model, counting)
    first = router.embed(["a court", "a fever", "a court"])
    assert counting.texts == 2
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(router.embed(["a fever", "a court"]), first[[1, 0]])
    assert counting.texts == 2
    router.embed(["a loop", "a prime"])  # of four, the one that was asked for longest ago leaves
    assert counting.texts == 4
    router.embed(["a court", "a loop", "a prime"])
    assert counting.texts == 4
    router.embed(["a fever"])
    assert counting.texts == 5
    assert router.embed([]).shape == (0, 32)
    many = [f"a court {number}" for number in range(8)]
    assert router.embed(many).shape == (8, 32)  # more than are remembered
    assert REMEMBERED > 100


def test_what_is_remembered_cannot_be_changed_from_outside(router: Router) -> None:
    once = router.embed(["the judge"])
    once[:] = 0
    assert router.embed(["the judge"]).any()


def test_threads_share_what_is_remembered(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.router.router.REMEMBERED", 5)
    texts = [f"the court {number}" for number in range(12)]
    expected = {text: router.embed([text])[0] for text in texts}

    def ask(start: int) -> bool:
        part = [texts[(start + step) % len(texts)] for step in range(4)]
        return all(
            np.allclose(one, expected[text], atol=1e-5) for text, one in zip(part, router.embed(part), strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(60)))


def test_a_router_of_another_encoder_is_refused(artifact: RouterArtifact, encoders: Encoders) -> None:
    with pytest.raises(ArtifactCorrupt, match="BertModel:other"):
        Router(replace(artifact, encoder="BertModel:other"), encoders)


@pytest.mark.parametrize("tune", [False, True], ids=["plain", "tuned"])
def test_an_artifact_survives_the_disk(
    artifact: RouterArtifact, tuned: RouterArtifact, encoders: Encoders, tmp_path: Path, tune: bool
) -> None:
    saved = tuned if tune else artifact
    saved.save(tmp_path)
    again = RouterArtifact.load(tmp_path)
    assert again.head.to_dict() == saved.head.to_dict()
    assert (again.encoder, again.provenance, again.threshold) == (saved.encoder, saved.provenance, saved.threshold)
    assert again.open_set.to_dict() == saved.open_set.to_dict()
    np.testing.assert_array_equal(again.head.weights, saved.head.weights)
    np.testing.assert_array_equal(again.rows.embeddings, saved.rows.embeddings)
    for name in ("domains", "sources", "ids", "texts"):
        assert getattr(again.rows, name) == getattr(saved.rows, name)
    texts = ["the court", "a loop"]
    assert [one.probabilities for one in Router(again, encoders).scores(texts)] == [
        one.probabilities for one in Router(saved, encoders).scores(texts)
    ]


@pytest.mark.parametrize("tune", [False, True], ids=["plain", "tuned"])
def test_equal_content_gives_equal_bytes(
    artifact: RouterArtifact, tuned: RouterArtifact, tmp_path: Path, tune: bool
) -> None:
    saved = tuned if tune else artifact
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        saved.save(folder)
        saved = RouterArtifact.load(folder)
    names = sorted(path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*") if path.is_file())
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"] if tune else []
    assert names == [*adapter, "router.json", "router.safetensors", "rows.json", "words.json"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def test_an_adapter_moves_the_embeddings_and_names_no_path(
    router: Router, tuned: RouterArtifact, encoders: Encoders, model: CachedModel, tmp_path: Path
) -> None:
    tuned.save(tmp_path)
    moved = Router.load(tmp_path, encoders)
    assert not np.allclose(moved.embed(["the court"]), router.embed(["the court"]), atol=1e-2)
    assert str(model.folder) not in (tmp_path / "adapter" / "adapter_config.json").read_text("utf-8")


def remove(path: Path) -> None:
    path.rmdir() if path.is_dir() else path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("router.safetensors", Path.unlink),
        ("router.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("router.safetensors", lambda path: path.write_bytes(b"")),
        ("router.json", Path.unlink),
        ("router.json", lambda path: path.write_text("{")),
        ("router.json", lambda path: path.write_text('{"head": {}}')),
        ("router.json", lambda path: path.write_text('{"format": 1}')),
        ("router.json", lambda path: path.write_text("[]")),
        ("router.json", lambda path: path.write_text(path.read_text().replace('"quantiles"', '"quartiles"'))),
        (
            "router.json",
            lambda path: path.write_text(path.read_text().replace('"threshold": 0.05', '"threshold": "?"')),
        ),
        ("rows.json", Path.unlink),
        ("rows.json", lambda path: path.write_text("[1, 2]")),
        ("rows.json", lambda path: path.write_text("[]")),
        ("rows.json", lambda path: path.write_bytes(b"\xff")),
    ],
)
def test_a_damaged_artifact_is_named(
    artifact: RouterArtifact, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    artifact.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ArtifactCorrupt, match=str(tmp_path)) as caught:
        RouterArtifact.load(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("names", "damage"),
    [
        (["adapter_model.safetensors"], Path.unlink),
        (["adapter_config.json"], Path.unlink),
        (["adapter_model.safetensors"], flip),
        (["adapter_config.json"], lambda path: path.write_text("{")),
        (["adapter_config.json"], lambda path: path.write_text("{}")),
        (["adapter_config.json", "adapter_model.safetensors"], Path.unlink),
        (
            ["adapter_config.json", "adapter_model.safetensors", "."],
            lambda path: path.rmdir() if path.is_dir() else path.unlink(),
        ),
    ],
)
def test_a_damaged_adapter_is_never_used(
    tuned: RouterArtifact, encoders: Encoders, tmp_path: Path, names: Sequence[str], damage: Callable[[Path], object]
) -> None:
    tuned.save(tmp_path)
    for name in names:
        damage(tmp_path / "adapter" / name)
    with pytest.raises(ArtifactCorrupt) as caught:
        Router.load(tmp_path, encoders)
    assert caught.value.hint
