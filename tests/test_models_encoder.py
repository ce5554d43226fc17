from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from collegium.errors import UnsupportedModel
from collegium.models.cache import ModelCache
from collegium.models.encoder import Encoder, Floats, Ints, TorchForward
from collegium.settings import DEFAULT_ENCODER
from collegium.tests.encoder_models import KINDS, embeddings_by_transformers, tiny_encoder_lora, tiny_encoder_of

TEXTS = [
    "explain the contract of the plaintiff",
    "a",
    "",
    "what is a python compiler and a recursion? " * 12,  # longer than the model sees
    "FEVER, vaccine; Übermut 日本 😀",
    "\n\t ",
    *(f"the sum of {number} and the prime {number * number}" for number in range(40)),  # more than a batch
]


@pytest.fixture
def local(tiny_encoder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_encoder, tmp_path / "local")


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Path], Encoder]:
    return lambda folder: Encoder(ModelCache(tmp_path / "models").get(str(folder)))


def pool_with(folder: Path, **modes: bool) -> Path:
    body = {"word_embedding_dimension": 32, **{f"pooling_mode_{mode}": on for mode, on in modes.items()}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(body))
    return folder


def reference(folder: Path) -> NDArray[np.float32]:
    package = pytest.importorskip("sentence_transformers")
    vectors: NDArray[np.float32] = package.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    return vectors


def test_the_vectors_are_those_of_sentence_transformers(local: Path, load: Callable[[Path], Encoder]) -> None:
    np.testing.assert_allclose(load(local).encode(TEXTS), reference(local), atol=1e-5)


def test_the_first_token_is_taken_where_the_folder_says_so(local: Path, load: Callable[[Path], Encoder]) -> None:
    mean = load(local).encode(TEXTS)
    pool_with(local, cls_token=True, mean_tokens=False)
    cls = load(local).encode(TEXTS)
    np.testing.assert_allclose(cls, reference(local), atol=1e-5)
    assert np.abs(cls - mean).max() > 0.01


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_a_folder_as_sentence_transformers_saves_it_today(
    local: Path, load: Callable[[Path], Encoder], tmp_path: Path, mode: str
) -> None:
    package = pytest.importorskip("sentence_transformers")
    pool_with(local, **{mode: True})
    package.SentenceTransformer(str(local), device="cpu").save(str(tmp_path / "saved"))
    np.testing.assert_allclose(load(tmp_path / "saved").encode(TEXTS), reference(local), atol=1e-5)


def test_vectors_have_length_one_and_keep_their_order(local: Path, load: Callable[[Path], Encoder]) -> None:
    encoder = load(local)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)


def test_threads_do_not_disturb_each_other(local: Path, load: Callable[[Path], Encoder]) -> None:
    expected = load(local).encode(TEXTS)
    encoder = load(local)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of things, from the first call on
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda text: encoder.encode([text])[0], TEXTS * 4))
    finally:
        sys.setswitchinterval(before)
    np.testing.assert_allclose(found, np.tile(expected, (4, 1)), atol=1e-5)


def test_no_texts_give_no_vectors(local: Path, load: Callable[[Path], Encoder]) -> None:
    assert load(local).encode([]).shape == (0, 32)


def test_a_folder_without_pooling_is_pooled_by_the_mean(local: Path, load: Callable[[Path], Encoder]) -> None:
    expected = load(local).encode(TEXTS)
    shutil.rmtree(local / "1_Pooling")
    np.testing.assert_allclose(load(local).encode(TEXTS), expected, atol=1e-6)


def test_a_folder_without_a_limit_reads_what_its_model_can(local: Path, load: Callable[[Path], Encoder]) -> None:
    (local / "sentence_bert_config.json").unlink()
    assert np.isfinite(load(local).encode(["court " * 1000])).all()


@pytest.mark.parametrize("modes", [{"max_tokens": True}, {"mean_tokens": True, "cls_token": True}, {"lasttoken": True}])
def test_other_pooling_is_refused_by_name(local: Path, load: Callable[[Path], Encoder], modes: dict[str, bool]) -> None:
    with pytest.raises(UnsupportedModel, match=", ".join(sorted(modes))) as caught:
        load(pool_with(local, **modes))
    assert caught.value.hint == "Supported: mean_tokens, cls_token."


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_computes_what_peft_does(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder_of(kind, tmp_path / "model")
    adapter = tiny_encoder_lora(tmp_path / "lora", model)
    texts = ["what is a court of the python", "a", "", "the fever is prime. " * 60]
    for one in (None, adapter):
        found = Encoder(model, TorchForward(model, one), window=128).encode(texts)
        np.testing.assert_allclose(found, embeddings_by_transformers(model, texts, 128, one), atol=1e-5)


def test_half_precision_weights_are_computed_with_in_float32(local: Path, load: Callable[[Path], Encoder]) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(local).bfloat16().save_pretrained(local)
    assert load(local).encode(TEXTS).dtype == np.float32


@dataclass
class Recorded:
    """Answers with the sums of the tokens' powers, and keeps what it was asked."""

    dimension: int = 3
    asked: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def __call__(self, ids: Ints, mask: Ints) -> Floats:
        assert mask.shape == ids.shape
        assert not ids[mask == 0].any()
        self.asked.append((ids.shape, int(mask.sum())))
        sums = np.stack([(ids * mask + one * mask).sum(1) ** (1 / one) for one in (1.0, 2.0, 3.0)], 1)
        vectors: Floats = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
        return vectors


def test_a_long_text_is_the_mean_of_its_windows_by_their_tokens(local: Path, tmp_path: Path) -> None:
    model = ModelCache(tmp_path / "models").get(str(local))
    forward = Recorded()
    words = ["court", "fever", "prime", "python", "recipe", "river", "soup"]
    whole = Encoder(model, forward, window=5, windows=3).encode([" ".join(words), "court", ""])
    assert forward.asked == [((5, 5), 2 + 3 + 4 + 4 + 5)]  # of seven words: two, two, three
    parts = [" ".join(words[at:to]) for at, to in ((0, 2), (2, 4), (4, 7))]
    vectors = Encoder(model, forward).encode(parts)
    mean = (vectors * np.array([[4], [4], [5]])).sum(axis=0)
    np.testing.assert_allclose(whole[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(whole[1:], Encoder(model, forward).encode(["court", ""]), atol=1e-6)


def test_windows_of_a_length_are_batched_together(local: Path, tmp_path: Path) -> None:
    model = ModelCache(tmp_path / "models").get(str(local))
    forward = Recorded()
    encoder = Encoder(model, forward, window=6, windows=4, batch_size=3)
    encoder.encode(["court", "court " * 16, "court", "", "court fever"])
    assert [shape for shape, _ in forward.asked] == [(3, 3), (3, 6), (2, 6)]


def test_an_identity_can_be_given(local: Path, tmp_path: Path) -> None:
    model = ModelCache(tmp_path / "models").get(str(local))
    assert Encoder(model, Recorded()).identity == model.identity
    assert Encoder(model, Recorded(), identity="tuned").identity == "tuned"


@pytest.mark.models
def test_the_real_encoder_gives_the_vectors_of_sentence_transformers(real_home: Path) -> None:
    model = ModelCache(real_home / "models").get(DEFAULT_ENCODER)
    np.testing.assert_allclose(Encoder(model).encode(TEXTS), reference(model.folder), atol=1e-5)
