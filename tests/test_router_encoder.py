from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import ArtifactCorrupt, UnsupportedModel
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.encoder import Encoder, TorchForward
from collegium.router.encoder import Encoders, Precision
from collegium.settings import DEFAULT_ENCODER
from collegium.tests.encoder_models import embeddings_by_transformers, tiny_encoder_lora, tiny_encoder_of

TEXTS = ["what is a court of the python", "the fever is prime", ""]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "collegium" / "encoders"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return tiny_encoder_of("Bert", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: CachedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_lora(tmp_path_factory.mktemp("adapter"), model)


def encoders(model: CachedModel, precision: Precision = "auto") -> Encoders:
    return Encoders(model, precision=precision, threads=1, device="cpu")


@pytest.mark.parametrize(("precision", "least"), [("auto", 0.97), ("int8", 0.97), ("float32", 0.999999)])
def test_an_adapter_is_merged(precision: Precision, least: float, model: CachedModel, adapter: Path) -> None:
    made = encoders(model, precision)
    for one in (None, adapter):
        expected = embeddings_by_transformers(model, TEXTS, 128, one)
        cosines = (made.get(one).encode(TEXTS) * expected).sum(axis=1)
        assert (cosines >= least).all()
        assert (cosines > 0.999999).all() == (precision == "float32")  # auto is int8 here


def test_equal_adapters_share_an_encoder(model: CachedModel, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text("utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}), "utf-8")
    made = encoders(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(made.get, [adapter, copy] * 4))
    assert made.identity(adapter) == made.identity(copy) != made.identity(None)
    first, *others = [one.encode(TEXTS) for one in found]
    assert all((first == other).all() for other in others)


def test_an_identity_names_model_and_adapter(model: CachedModel, adapter: Path, tmp_path: Path) -> None:
    made = encoders(model)
    assert made.identity(None) == model.identity
    named = made.identity(adapter)
    start, _, content = named.partition("+")
    assert (start, len(content)) == (model.identity, 16)
    scaled = shutil.copytree(adapter, tmp_path / "scaled")
    config = json.loads((scaled / "adapter_config.json").read_text("utf-8"))
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}), "utf-8")
    other = tiny_encoder_lora(tmp_path / "other", model, seed=2)
    assert len({named, made.identity(scaled), made.identity(other)}) == 3


def test_a_long_prompt_is_read_to_its_end(model: CachedModel, adapter: Path) -> None:
    encoder = encoders(model, "float32").get(adapter)
    body = "the fever is prime. " * 200
    plain, late = encoder.encode([body, body + "python python python"])
    assert np.abs(plain - late).max() > 1e-3
    short = encoder.encode(["the fever is prime. " * 8 + " court " * 100])[0]  # two windows
    parts = [" ".join(words) for words in halves("the fever is prime . " * 8 + " court " * 100)]
    vectors = Encoder(model, TorchForward(model, adapter)).encode(parts)
    mean = vectors.mean(axis=0)
    np.testing.assert_allclose(short, mean / np.linalg.norm(mean), atol=1e-5)


def halves(text: str) -> tuple[list[str], list[str]]:
    """Of a text whose words are a token each."""
    words = text.split()
    return words[: len(words) // 2], words[len(words) // 2 :]


def test_what_int8_cannot_run_goes_on_in_float32(
    model: CachedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("collegium.models.export.CLOSE", 1.1)
    made = encoders(model)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(
            made.get(None).encode(TEXTS), embeddings_by_transformers(model, TEXTS, 128), atol=1e-5
        )
        made.get(None)
    assert ["Bert cannot run in int8" in record.message for record in caplog.records] == [True]
    with pytest.raises(UnsupportedModel, match="Bert cannot run in int8"):
        encoders(model, "int8").get(None)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    model: CachedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.isfinite(encoders(model).get(None).encode(TEXTS)).all()
    assert "float32" in caplog.text


def test_float32_leaves_nothing_behind(model: CachedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoders(model, "float32").get(None)
    assert not (tmp_path / "cache").exists()


def test_an_adapter_of_another_model_is_refused(model: CachedModel, adapter: Path, tmp_path: Path) -> None:
    other = tiny_encoder_of("DistilBert", tmp_path / "other")
    for precision in ("int8", "float32", "auto"):
        with pytest.raises(ArtifactCorrupt, match="does not fit DistilBert"):
            encoders(other, precision).get(adapter)


def test_pickled_weights_are_refused(model: CachedModel, adapter: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ArtifactCorrupt, match=r"has no adapter_model\.safetensors"):
        encoders(model).get(pickled)


@pytest.mark.gpu
def test_a_gpu_computes_the_same(model: CachedModel, adapter: Path, cache: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = Encoders(model).get(adapter).encode(TEXTS)
    np.testing.assert_allclose(found, embeddings_by_transformers(model, TEXTS, 128, adapter), atol=1e-4)


@pytest.mark.models
def test_the_real_encoder_is_close_in_int8(real_home: Path) -> None:
    model = ModelCache(real_home / "models").get(DEFAULT_ENCODER)
    texts = ["What is a tort?", "My head hurts and I have a fever.", "def f(x): return x", "hi", "2 + 2 = " * 300]
    exact, quick = (encoders(model, precision).get(None).encode(texts) for precision in ("float32", "int8"))
    assert (exact * quick).sum(axis=1).mean() > 0.98
