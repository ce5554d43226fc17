from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from collegium.errors import ArtifactCorrupt, UnsupportedModel
from collegium.models.cache import CachedModel
from collegium.models.encoder import Encoder
from collegium.models.onnx import OnnxForward, quantized
from collegium.tests.encoder_models import KINDS, embeddings_by_transformers, tiny_encoder_lora, tiny_encoder_of

TEXTS = [
    "what is a court of the python",
    "a",
    "the fever is prime. " * 10,
    "What IS Übermut 日本",
    "the  double space",
    "",
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return tiny_encoder_of("Bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def lora(bert: CachedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_lora(tmp_path_factory.mktemp("lora"), bert)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "collegium" / "encoders"


def int8(model: CachedModel, adapter: Path | None = None) -> Encoder:
    return Encoder(model, OnnxForward(quantized(model, adapter), threads=1), window=128)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_close_to_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder_of(kind, tmp_path / "model")
    adapter = tiny_encoder_lora(tmp_path / "lora", model)
    for one in (None, adapter):
        expected = embeddings_by_transformers(model, TEXTS, 128, one)
        found = int8(model, one).encode(TEXTS)
        assert ((found * expected).sum(axis=1) > 0.97).all()
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_vector_does_not_depend_on_what_else_is_asked(bert: CachedModel) -> None:
    encoder = int8(bert)
    together = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([text])[0], vector)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: encoder.encode([text])[0], TEXTS * 5))
    np.testing.assert_array_equal(found, np.tile(together, (5, 1)))


def test_it_is_made_once_by_whoever_comes_first(
    bert: CachedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(lambda _: quantized(bert), range(3)))
    path = made.pop()
    assert not made
    monkeypatch.setattr("collegium.models.export.export_int8", None)
    assert quantized(bert) == path
    assert [one.suffix for one in sorted(own_cache.iterdir())] == [".lock", ".onnx"]


def test_the_graphs_used_last_are_kept(bert: CachedModel, lora: Path, own_cache: Path) -> None:
    first = quantized(bert)
    os.utime(first, (1, 1))
    others = [own_cache / f"{number}.onnx" for number in range(9)]
    for number, path in enumerate(others):
        path.write_bytes(b"graph")
        path.with_suffix(".lock").touch()
        os.utime(path, (100 + number, 100 + number))
    assert quantized(bert) == first  # now it is used after all of them
    assert len(list(own_cache.glob("*.onnx"))) == 10
    kept = {first, quantized(bert, lora), *others[3:]}
    assert set(own_cache.iterdir()) == kept | {path.with_suffix(".lock") for path in kept}


def test_a_graph_in_use_elsewhere_is_left(bert: CachedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.models.onnx.KEPT", 1)
    own_cache.mkdir(parents=True)
    locked, opened, old = (own_cache / f"{name}.onnx" for name in ("locked", "opened", "old"))
    for path in (locked, opened, old):
        path.write_bytes(b"graph")
        os.utime(path, (2**40, 2**40))  # by a clock that was wrong: what has just been made stays all the same
    unlink = Path.unlink

    def as_on_windows(path: Path, missing_ok: bool = False) -> None:
        if path == opened:
            raise PermissionError(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", as_on_windows)
    with FileLock(locked.with_suffix(".lock")):
        made = quantized(bert)
    assert set(own_cache.glob("*.onnx")) == {made, locked, opened}


def test_what_a_killed_process_left_is_cleared_away(bert: CachedModel, own_cache: Path) -> None:
    path = quantized(bert)
    whole = path.read_bytes()
    partial = path.with_name(f".partial-{path.stem}")
    path.unlink()
    partial.mkdir()
    (partial / "int8.onnx").write_bytes(whole[:100])
    assert quantized(bert).stat().st_size > 100
    assert not partial.exists()


def test_whatever_changes_the_vectors_makes_another_file(bert: CachedModel, lora: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert.folder, tmp_path / "model")
    copied = replace(bert, folder=folder)
    assert quantized(copied) == quantized(bert)
    files = {quantized(bert), quantized(bert, lora)}
    files.add(quantized(bert, tiny_encoder_lora(tmp_path / "other", bert, seed=2)))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}), "utf-8")
    files.add(quantized(copied))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}), "utf-8")
    files.add(quantized(copied))
    assert len(files) == 5


def test_the_first_token_is_taken_where_the_folder_says_so(bert: CachedModel, tmp_path: Path) -> None:
    folder = shutil.copytree(bert.folder, tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}), "utf-8")
    first = replace(bert, folder=folder)
    cosines = (int8(first).encode(TEXTS) * Encoder(first).encode(TEXTS)).sum(axis=1)
    assert (cosines > 0.97).all()


def test_a_model_whose_graph_is_not_itself_is_refused(tmp_path: Path, own_cache: Path) -> None:
    model = funnel(tmp_path / "model")
    with pytest.raises(UnsupportedModel) as caught:
        quantized(model)
    assert str(own_cache) in str(caught.value.hint)
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".lock", ".refused"]


def funnel(folder: Path) -> CachedModel:
    """Its code takes lengths for constant while it is traced."""
    from transformers import FunnelConfig, FunnelModel

    tiny_encoder_of("Bert", folder)
    config = FunnelConfig(vocab_size=70, d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1])
    FunnelModel(config).save_pretrained(folder)
    return CachedModel("tiny funnel", folder, "FunnelModel", "FunnelModel:tiny")


@pytest.mark.parametrize("what", ["export", "quantisation", "distance"])
def test_what_cannot_be_is_not_tried_again(
    what: str, bert: CachedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("aten::strange is not supported\nand more")

    if what == "export":
        monkeypatch.setattr("torch.onnx.export", fail)
    elif what == "quantisation":
        monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fail)
    else:
        monkeypatch.setattr("collegium.models.export.CLOSE", 1.1)
    with pytest.raises(UnsupportedModel, match=r"^Bert cannot run in int8: (aten::strange is not|its embeddings)"):
        quantized(bert)
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".lock", ".refused"]
    monkeypatch.setattr("collegium.models.export.pooled", None)
    with pytest.raises(UnsupportedModel, match=r"^Bert cannot run in int8: "):
        quantized(bert)


def test_a_graph_that_is_not_valid_is_refused(
    bert: CachedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path, **_: Any) -> None:
        target.write_bytes(b"no graph")

    monkeypatch.setattr("onnxruntime.quantization.shape_inference.quant_pre_process", spoil)
    with pytest.raises(UnsupportedModel, match=r"^Bert cannot run in int8: "):
        quantized(bert)


def test_a_file_that_is_no_graph_or_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    for name in ("broken", "gone"):
        with pytest.raises(UnsupportedModel, match=rf"{name}\.onnx"):
            OnnxForward(tmp_path / f"{name}.onnx")


def test_an_adapter_that_is_none_is_refused(bert: CachedModel, tmp_path: Path) -> None:
    with pytest.raises(ArtifactCorrupt, match=r"has no adapter_config\.json"):
        quantized(bert, tmp_path)


def test_the_root_logger_is_spared(bert: CachedModel, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    quantized(bert)
    assert {record.name for record in caplog.records} == {"collegium.models.export"}


def test_the_root_logger_is_left_as_it_was(bert: CachedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as in a program that has not set up logging
    quantized(bert)
    assert (root.handlers, root.filters) == ([], [])


def test_rows_are_computed_side_by_side_by_as_many_threads_as_asked_for(
    bert: CachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.models.onnx.cores", lambda: 3)
    path = quantized(bert)
    for asked, expected in ((2, 2), (0, 3)):
        forward = OnnxForward(path, asked)
        together = threading.Barrier(expected, timeout=5)
        embed = forward._embed

        def meet(ids: Any, together: threading.Barrier = together, embed: Any = embed) -> Any:
            together.wait()  # passes only where so many rows are under way at once
            return embed(ids)

        monkeypatch.setattr(forward, "_embed", meet)
        ids = np.full((expected, 4), 5, np.int64)
        assert forward(ids, np.ones_like(ids)).shape == (expected, forward.dimension)


def test_the_threads_of_a_graph_end_with_it(bert: CachedModel) -> None:
    def threads() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("collegium-encoder")}

    path, before = quantized(bert), threads()
    ids = np.full((4, 4), 5, np.int64)
    for _ in range(3):
        forward = OnnxForward(path, 2)
        forward(ids, np.ones_like(ids))
    mine = threads() - before
    assert mine
    del forward
    gc.collect()
    for thread in mine:
        thread.join(timeout=5)
    assert not threads() & mine
