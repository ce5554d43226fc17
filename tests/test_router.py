from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.errors import ArtifactCorrupt, InvalidRequest, NameTaken, UnknownDomain
from collegium.models.cache import ModelCache
from collegium.models.encoder import Encoder
from collegium.router.artifact import RouterArtifact
from collegium.router.fit import calibrate, fit_head
from collegium.router.head import Floats, Head
from collegium.router.policy import Scores, degraded, explicit, top1
from collegium.router.router import Router

COOKING = ["a banana recipe", "the soup in the kitchen", "explain the recipe", "kitchen soup and banana soup"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_encoder)))


@pytest.fixture(scope="module")
def artifact(tiny_bundle: Path) -> RouterArtifact:
    release = json.loads((tiny_bundle / "release.json").read_text())
    return RouterArtifact.load(tiny_bundle / "artifacts" / release["router"])


@pytest.fixture(scope="module")
def router(artifact: RouterArtifact, encoder: Encoder) -> Router:
    return Router(artifact, encoder, "v1")


def random_head(weights: Floats, temperature: float = 1.0, coverage: float = 0.9) -> Head:
    names = tuple(f"d{number}" for number in range(len(weights)))
    return Head(names, weights, np.zeros(len(weights), np.float32), temperature, 0.0, coverage)


finite = st.floats(-100, 100, width=32)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(2, 6), st.just(4)), elements=finite),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=finite),
    st.floats(0.05, 20),
)
def test_probabilities_are_distributions(weights: Floats, embeddings: Floats, temperature: float) -> None:
    found = random_head(weights, temperature).probabilities(embeddings)
    assert found.shape == (len(embeddings), len(weights))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.floats(0.01, 0.999))
def test_a_prediction_set_is_the_smallest_that_covers(numbers: list[int], coverage: float) -> None:
    probabilities = {f"d{index}": number / sum(numbers) for index, number in enumerate(numbers)}
    chosen = random_head(np.zeros((1, 1), np.float32), coverage=coverage).prediction_set(probabilities)
    inside = [probabilities[name] for name in chosen]
    outside = [probability for name, probability in probabilities.items() if name not in chosen]
    assert sum(inside) >= coverage - 1e-9
    assert sum(inside[:-1]) < coverage
    assert inside == sorted(inside, reverse=True)
    assert min(inside) >= max(outside, default=0)


def test_a_prompt_is_scored_over_all_domains(router: Router, prompts: Mapping[str, str]) -> None:
    scores = router.scores([prompts[domain] for domain in router.domains])
    assert [one.domain for one in scores] == ["code", "health", "law", "math"] == list(router.domains)
    for one in scores:
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.known
        assert one.confidence == max(one.probabilities.values())
        assert one.prediction_set[0] == one.domain
        assert one.router_version == "v1"
    assert not router.scores([prompts["unknown"]])[0].known


def test_only_the_domains_that_are_asked_for_are_weighed(router: Router, prompts: Mapping[str, str]) -> None:
    whole, some = (router.scores([prompts["law"]], domains=which)[0] for which in (None, ["math", "code"]))
    assert set(some.probabilities) == {"math", "code"}
    assert sum(some.probabilities.values()) == pytest.approx(1)
    odds = whole.probabilities["math"] / whole.probabilities["code"]
    assert some.probabilities["math"] / some.probabilities["code"] == pytest.approx(odds)
    with pytest.raises(UnknownDomain, match="No domain tax") as caught:
        router.scores(["x"], domains=["law", "tax"])
    assert caught.value.hint == "Known domains: code, health, law, math."


def test_domains_that_are_out_of_the_question_are_weighed_too(
    artifact: RouterArtifact, encoder: Encoder, prompts: Mapping[str, str]
) -> None:
    sharp = Router(replace(artifact, head=replace(artifact.head, temperature=0.001)), encoder)
    scores = sharp.scores([prompts["law"]], domains=["math", "code"])[0]
    assert sum(scores.probabilities.values()) == pytest.approx(1)


def test_no_domains_to_weigh_are_refused(router: Router) -> None:
    with pytest.raises(InvalidRequest):
        router.scores(["x"], domains=[])


def test_a_domain_is_learned_from_examples(router: Router, encoder: Encoder, prompts: Mapping[str, str]) -> None:
    learned = Router(router.add_domain("cooking", COOKING), encoder)
    assert learned.domains == ("code", "cooking", "health", "law", "math")
    assert learned.scores(["explain the soup and the banana"])[0].domain == "cooking"
    for domain in router.domains:
        assert learned.scores([prompts[domain]])[0].domain == domain
    assert "cooking" not in router.domains


def test_a_domain_is_learned_from_a_description_alone(
    router: Router, encoder: Encoder, prompts: Mapping[str, str]
) -> None:
    learned = Router(router.add_domain("kitchen", description="soup and banana recipe"), encoder)
    assert learned.scores(["a banana soup recipe"])[0].domain == "kitchen"
    assert [learned.scores([prompts[domain]])[0].domain for domain in router.domains] == list(router.domains)


def test_two_domains_are_learned_one_after_the_other_and_forgotten(router: Router, encoder: Encoder) -> None:
    first = Router(router.add_domain("cooking", COOKING), encoder)
    both = Router(first.add_domain("music", ["a guitar and a violin", "explain the violin", "guitar"]), encoder)
    assert both.scores(["explain the guitar"])[0].domain == "music"
    assert both.scores(["a recipe"])[0].domain == "cooking"
    after = both.remove_domain("music")
    assert after.head.domains == first.domains
    np.testing.assert_allclose(after.head.weights, first.artifact.head.weights, atol=1e-3)
    assert set(after.rows.domains) == set(first.domains)


def test_what_is_learned_keeps_calibration_provenance_and_no_text(router: Router, artifact: RouterArtifact) -> None:
    learned = router.add_domain("cooking", [*COOKING, f" {COOKING[0]} ", "", "  "])
    before, after = artifact.head, learned.head
    assert (after.temperature, after.threshold, after.coverage) == (
        before.temperature,
        before.threshold,
        before.coverage,
    )
    assert (learned.provenance, learned.encoder) == (artifact.provenance, artifact.encoder)
    assert len(learned.rows) == len(artifact.rows) + len(COOKING)
    assert not set(learned.rows.ids) & set(COOKING)


def test_domains_that_cannot_be_learned_are_refused(router: Router) -> None:
    with pytest.raises(NameTaken, match="'law'"):
        router.add_domain("law", COOKING)
    with pytest.raises(InvalidRequest, match="what 'cooking' is about") as caught:
        router.add_domain("cooking", [" "], description=" ")
    assert caught.value.hint


def test_domains_that_cannot_be_forgotten_are_refused(router: Router, encoder: Encoder) -> None:
    with pytest.raises(UnknownDomain, match="'tax'") as caught:
        router.remove_domain("tax")
    assert caught.value.hint == "Known domains: code, health, law, math."
    pair = Router(Router(router.remove_domain("code"), encoder).remove_domain("math"), encoder)
    assert pair.domains == ("health", "law")
    with pytest.raises(InvalidRequest, match="two domains"):
        pair.remove_domain("law")


def test_two_domains_are_told_apart_too(router: Router, encoder: Encoder, prompts: Mapping[str, str]) -> None:
    pair = Router(Router(router.remove_domain("code"), encoder).remove_domain("math"), encoder)
    assert [one.domain for one in pair.scores([prompts["health"], prompts["law"]])] == ["health", "law"]


def test_a_router_of_another_encoder_is_refused(artifact: RouterArtifact, encoder: Encoder) -> None:
    with pytest.raises(ArtifactCorrupt, match="BertModel:other"):
        Router(replace(artifact, encoder="BertModel:other"), encoder)


def test_an_artifact_survives_the_disk(artifact: RouterArtifact, encoder: Encoder, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    again = RouterArtifact.load(tmp_path)
    assert again.head.to_dict() == artifact.head.to_dict()
    assert (again.encoder, again.provenance) == (artifact.encoder, artifact.provenance)
    np.testing.assert_array_equal(again.head.weights, artifact.head.weights)
    np.testing.assert_array_equal(again.rows.embeddings, artifact.rows.embeddings)
    for name in ("domains", "sources", "ids"):
        assert getattr(again.rows, name) == getattr(artifact.rows, name)
    texts = ["the court", "a loop"]
    assert [one.probabilities for one in Router(again, encoder).scores(texts)] == [
        one.probabilities for one in Router(artifact, encoder).scores(texts)
    ]


def test_equal_content_gives_equal_bytes(artifact: RouterArtifact, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        artifact.save(folder)
        artifact = RouterArtifact.load(folder)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["router.json", "router.safetensors", "rows.json"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("router.safetensors", Path.unlink),
        ("router.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("router.safetensors", lambda path: path.write_bytes(b"")),
        ("router.json", Path.unlink),
        ("router.json", lambda path: path.write_text("{")),
        ("router.json", lambda path: path.write_text('{"head": {}}')),
        ("router.json", lambda path: path.write_text("[]")),
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


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_threshold_refuses_the_stated_share(share: float) -> None:
    rng = np.random.default_rng(0)
    domains = [f"d{number % 3}" for number in range(3000)]
    places = np.eye(3, 8)[[int(domain[1]) for domain in domains]]
    embeddings = (places + 0.4 * rng.normal(size=places.shape)).astype(np.float32)
    head = calibrate(fit_head(embeddings, domains, domains), embeddings, domains, domains, share)
    probabilities = head.probabilities(embeddings)
    assert (probabilities.max(axis=1) < head.threshold).mean() == pytest.approx(share, abs=0.01)
    # Calibrated: as sure as it is right.
    right = [head.domains[best] == domain for best, domain in zip(probabilities.argmax(axis=1), domains, strict=True)]
    assert probabilities.max(axis=1).mean() == pytest.approx(np.mean(right), abs=0.02)


def test_a_large_source_does_not_speak_for_its_domain() -> None:
    rng = np.random.default_rng(0)
    places = {("a", "large"): [1, 0, 0], ("a", "small"): [0, 1, 0], ("b", "only"): [0, 0, 1]}
    sizes = {"large": 1000, "small": 20, "only": 500}
    labels = [key for key in places for _ in range(sizes[key[1]])]
    embeddings = np.array([places[key] for key in labels], np.float32)
    embeddings += 0.05 * rng.normal(size=embeddings.shape).astype(np.float32)
    head = fit_head(embeddings, [domain for domain, _ in labels], [source for _, source in labels])
    large, small = head.probabilities(np.array([[1, 0, 0], [0, 1, 0]], np.float32))[:, 0]
    assert large == pytest.approx(small, abs=0.02)


SCORES = Scores(np.zeros(2, np.float32), {"law": 0.6, "code": 0.3, "math": 0.1}, ("law", "code"), 0.6, 0.5, "v1")
UNSURE = replace(SCORES, threshold=0.7)
EXPERTS = {"law": "tort-expert", "code": "coder"}


@pytest.mark.parametrize(
    ("scores", "experts", "expected"),
    [
        (SCORES, EXPERTS, ("law", "tort-expert", "routed")),
        (SCORES, {"code": "coder"}, ("law", "base", "no_expert")),
        (UNSURE, EXPERTS, (None, "base", "unknown_domain")),
        (replace(SCORES, threshold=0.6), EXPERTS, ("law", "tort-expert", "routed")),
    ],
)
def test_the_likeliest_domain_decides(scores: Scores, experts: Mapping[str, str], expected: tuple[str, ...]) -> None:
    decision = top1(scores, experts, "base")
    assert (decision.domain, decision.expert, decision.reason) == expected
    assert decision.probabilities == scores.probabilities
    assert decision.prediction_set == scores.prediction_set
    assert (decision.confidence, decision.threshold, decision.router_version) == (0.6, scores.threshold, "v1")
    assert sum(weight for _, weight in decision.candidates) == 1


def test_an_expert_that_is_asked_for_answers() -> None:
    for scores, domain in ((SCORES, "law"), (UNSURE, None)):
        decision = explicit(scores, "coder")
        assert (decision.domain, decision.expert, decision.reason) == (domain, "coder", "explicit")


def test_a_degraded_decision_keeps_what_was_measured() -> None:
    decision = degraded(top1(SCORES, EXPERTS, "base"), "base")
    assert (decision.domain, decision.expert, decision.reason) == ("law", "base", "degraded")
    assert decision.probabilities == SCORES.probabilities
