"""An encoder is tuned: the loss by hand, the batches by count, and prompts of one domain that come to lie together."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.models.cache import CachedModel, ModelCache
from collegium.router.build import LabelledPrompt
from collegium.router.encoder import Encoders
from collegium.router.head import Floats
from collegium.router.rows import BACKGROUND
from collegium.tests.encoder_models import tiny_encoder_of
from collegium.training.routing.augment import LETTERS, WRAPPERS, augment, typos
from collegium.training.routing.tune_encoder import TEMPERATURE, Tuning, _batches, contrastive, tune_encoder

QUICK = Tuning(steps=20, batch=24, tokens=32, rank=8, learning_rate=1.5e-2, augmented=0.0)
# Domains that the tiny encoder does not tell apart: its own lie elsewhere.
SENTENCES = ["what is a {0} and a {1}", "explain the {0}", "how does a {0} differ from a {1}", "is my {1} a {0} or {2}"]
TAUGHT = {"music": ["guitar", "violin", "river"], "food": ["soup", "banana", "kitchen"]}


@pytest.fixture(scope="module")
def model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_encoder))


def rows_of(taught: dict[str, list[str]], sources: Sequence[str] = ("x",)) -> list[LabelledPrompt]:
    return [
        LabelledPrompt(sentence.format(one, other, one), domain, source, f"{domain}-{one}-{other}")
        for domain, words in taught.items()
        for sentence in SENTENCES
        for one in words
        for other in words
        for source in sources
    ]


def silent(what: str, done: int, of: int) -> None:
    pass


def separation(embeddings: Floats, domains: Sequence[str]) -> float:
    """How much nearer prompts are to those of their domain than to others, in cosine."""
    same = np.array([[one == other for other in domains] for one in domains])
    cosines = embeddings @ embeddings.T
    return float(cosines[same].mean() - cosines[~same].mean())


def test_tuning_brings_domains_apart_and_the_router_loads_it(model: CachedModel, tmp_path: Path) -> None:
    rows = rows_of(TAUGHT)
    told: list[tuple[str, int, int]] = []
    report = tune_encoder(model, rows, tmp_path, QUICK, lambda *one: told.append(one))
    first = tune_encoder(model, rows, tmp_path / "first", replace(QUICK, steps=1), silent)
    assert report["loss"] < 0.7 * first["loss"]
    assert {name: report[name] for name in ("steps", "rank", "seed")} == {"steps": 20, "rank": 8, "seed": 0}
    assert told == [("tuning the encoder", step, 20) for step in range(1, 21)]
    encoders = Encoders(model, precision="float32", device="cpu")
    # The shape of the sentence is another, so it is the words that were learned.
    texts = ["the {0}", "a {0} and the {1}", "{0} {1} {0}"]
    asked = [(text.format(words[0], words[1]), domain) for domain, words in TAUGHT.items() for text in texts]
    plain, tuned = (
        separation(encoders.get(adapter).encode([text for text, _ in asked]), [domain for _, domain in asked])
        for adapter in (None, tmp_path)
    )
    assert tuned > plain + 0.2


def test_tuning_is_the_same_for_a_seed(model: CachedModel, tmp_path: Path) -> None:
    tuning = replace(QUICK, steps=3, augmented=0.5)
    encoders = Encoders(model, precision="float32", device="cpu")
    names = {
        folder: encoders.identity(_tuned(model, tmp_path / folder, replace(tuning, seed=seed)))
        for folder, seed in (("one", 1), ("again", 1), ("other", 2))
    }
    assert names["one"] == names["again"] != names["other"]


def _tuned(model: CachedModel, folder: Path, tuning: Tuning) -> Path:
    tune_encoder(model, rows_of(TAUGHT), folder, tuning, silent)
    return folder


def test_long_prompts_are_cut_anywhere(model: CachedModel, tmp_path: Path) -> None:
    rows = [replace(row, text=f"{row.text} " * 40) for row in rows_of(TAUGHT)]
    assert np.isfinite(tune_encoder(model, rows, tmp_path, replace(QUICK, steps=2), silent)["loss"])


def test_a_tokenizer_that_adds_nothing_will_do(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "bare")
    body = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(body | {"post_processor": None}), "utf-8")
    bare = ModelCache(tmp_path / "models").get(str(folder))
    rows = [*rows_of(TAUGHT), LabelledPrompt("", BACKGROUND, "x", "nothing")]
    assert np.isfinite(tune_encoder(bare, rows, tmp_path / "out", replace(QUICK, steps=2), silent)["loss"])


def test_a_model_that_reads_its_first_token_is_tuned_on_it(tmp_path: Path) -> None:
    model = tiny_encoder_of("Bert", tmp_path / "model")
    losses = []
    for mode in ("mean", "cls"):
        (model.folder / "1_Pooling").mkdir(exist_ok=True)
        (model.folder / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode": "{mode}"}}', "utf-8")
        rows = [LabelledPrompt(f"the {word} of python", word, "x", word) for word in ("court", "fever")]
        losses.append(tune_encoder(model, rows, tmp_path / mode, replace(QUICK, steps=1), silent)["loss"])
    assert losses[0] != losses[1]


def test_one_domain_is_told_apart_from_the_background(model: CachedModel, tmp_path: Path) -> None:
    rows = rows_of({"music": ["guitar"], BACKGROUND: ["soup"]})
    assert tune_encoder(model, rows, tmp_path, replace(QUICK, steps=1), silent)["steps"] == 1


def test_one_domain_is_nothing_to_tell_apart(model: CachedModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="only one"):
        tune_encoder(model, rows_of({"music": ["guitar"]}), tmp_path, QUICK, silent)


def test_the_contrastive_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [0, 1, 0, 2, 1, 0, 3]  # 2 and 3 have no pair
    losses = []
    for i, label in enumerate(labels):
        others = [j for j in range(7) if j != i]
        total = sum(np.exp(vectors[i] @ vectors[j] / TEMPERATURE) for j in others)
        pairs = [j for j in others if labels[j] == label]
        each = [-np.log(np.exp(vectors[i] @ vectors[j] / TEMPERATURE) / total) for j in pairs]
        if each:
            losses.append(np.mean(each))
    found = contrastive(torch.tensor(vectors), torch.tensor(labels))
    assert found.item() == pytest.approx(np.mean(losses))


def test_without_pairs_there_is_nothing_to_contrast() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    found = contrastive(vectors, torch.tensor([0, 1, 2]))
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == 0
    assert vectors.grad is not None
    assert not vectors.grad.any()


@pytest.mark.parametrize("batch", [4, 6, 64])
def test_domains_and_their_sources_are_drawn_as_often(batch: int) -> None:
    sizes = {("a", "x"): 200, ("a", "y"): 3, ("b", "x"): 40, ("c", "z"): 1, ("", "w"): 70}
    rows = [
        LabelledPrompt(f"text {number}", domain, source, str(number))
        for (domain, source), size in sizes.items()
        for number in range(size)
    ]
    batches = list(_batches(rows, Tuning(steps=400, batch=batch), random.Random(0)))
    assert [len(one) for one in batches] == [batch] * 400
    drawn = Counter((row.domain, row.source) for one in batches for row, _ in one)
    each = 400 * batch / 4
    for domain in ("a", "b", "c", ""):
        assert sum(count for key, count in drawn.items() if key[0] == domain) == pytest.approx(each, rel=0.1)
    assert drawn["a", "x"] == pytest.approx(drawn["a", "y"], rel=0.15)
    for one in batches:  # nobody is without a pair
        assert min(Counter(row.domain for row, _ in one).values()) >= 2


def test_as_many_are_augmented_as_is_asked() -> None:
    rows = rows_of(TAUGHT)
    for share in (0.0, 0.5, 1.0):
        batches = _batches(rows, Tuning(steps=50, augmented=share), random.Random(0))
        changed = [text != row.text for one in batches for row, text in one]
        assert np.mean(changed) <= share
        assert np.mean(changed) >= 0.75 * share  # some have nothing to change: no capital, no end mark


texts = st.text(min_size=0, max_size=60)
seeds = st.integers(0, 1000)


@given(texts, seeds, st.integers(0, 5))
def test_typos_change_a_few_letters(text: str, seed: int, count: int) -> None:
    found = typos(text, random.Random(seed), count)
    assert found == typos(text, random.Random(seed), count)
    assert abs(len(found) - len(text)) <= count
    if len(text) < 4:
        assert found == text
    before, after = Counter(text), Counter(found)
    assert sum((before - after).values()) <= count
    assert sum((after - before).values()) <= count
    assert set(after) <= set(before) | set(LETTERS)


@given(texts, seeds)
def test_what_is_augmented_is_still_there(text: str, seed: int) -> None:
    found = augment(text, random.Random(seed))
    assert found == augment(text, random.Random(seed))
    wrapped = any(found == wrapper.format(text) for wrapper in WRAPPERS)
    plain = found.lower() in {text.lower(), text.upper().lower(), text.rstrip(" ?.!").lower()}
    assert wrapped or plain or abs(len(found) - len(text)) <= 2 + len(text) - len(text.rstrip(" ?.!")) or not text


def test_every_change_occurs() -> None:
    rng = random.Random(0)
    found = {augment("What is a Tort?", rng) for _ in range(400)}
    assert {"what is a tort?", "WHAT IS A TORT?", "What is a Tort"} < found
    assert {wrapper.format("What is a Tort?") for wrapper in WRAPPERS} < found
    assert len(found) > 60


def test_braces_of_a_prompt_are_text() -> None:
    rng = random.Random(0)
    assert any("f{0} {x}" in augment("f{0} {x}", rng) for _ in range(20))
