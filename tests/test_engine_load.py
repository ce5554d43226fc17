"""What settings make of a model: its precision, its device, how much memory it takes, how many threads."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import CollegiumError, ContextTooLong, ModelUnavailable, SettingsError
from collegium.experts.engine.batch import Decoder
from collegium.experts.engine.canary import CANARY_PAGES
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.load import load_decoder
from collegium.models.cache import CachedModel
from collegium.models.load import Precision, cores, limit_threads, load_tokenizer, pick_device, pick_dtype
from collegium.schema import Sampling
from collegium.serving import Serving
from collegium.settings import Settings
from collegium.tests.engine_doubles import collect

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
Load = Callable[..., Decoder]


@pytest.fixture
def load(tiny_base: Path) -> Iterator[Load]:
    import torch

    opened: list[Decoder] = []

    def make(precision: Precision = "auto", device: str = "cpu", **options: Any) -> Decoder:
        model = CachedModel("the tiny model", tiny_base, "LlamaForCausalLM", "tiny")
        options = {"threads": 1, "cache_bytes": 1 << 20} | options
        opened.append(load_decoder(model, precision=precision, device=torch.device(device), **options))
        return opened[-1]

    yield make
    for decoder in opened:
        decoder.close()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> None:
        raise ModelUnavailable("There is no C compiler on the PATH.")

    for module in ("load", "kernels"):
        monkeypatch.setattr(f"collegium.experts.engine.{module}.library", library)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_is_the_one_that_was_asked_for(load: Load, precision: Precision) -> None:
    assert load(precision).precision == precision


def test_int8_is_taken_where_there_is_a_compiler(load: Load) -> None:
    assert load("auto").precision == "int8"


def test_else_another_is_and_it_is_said_once(load: Load, no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    with caplog.at_level(logging.WARNING):
        decoder = load("auto")
    assert decoder.precision == str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    assert len(caplog.messages) == 1
    assert "no C compiler" in caplog.messages[0]


def test_int8_without_a_compiler_is_an_error(load: Load, no_compiler: None) -> None:
    with pytest.raises(ModelUnavailable, match="no C compiler"):
        load("int8")


def test_int8_is_not_for_a_gpu(load: Load) -> None:
    with pytest.raises(SettingsError, match=r"int8 runs on the CPU alone.*device.*precision"):
        load("int8", device="cuda")


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    with pytest.raises(SettingsError, match="no GPU"):
        pick_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [pick_device(choice).type for choice in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("megabytes", [1, 3])
def test_the_cache_takes_what_it_may(load: Load, precision: Precision, megabytes: int) -> None:
    decoder = load(precision, cache_bytes=megabytes << 20)
    # A head of 8 values, in int8, takes the place of up to 16, and is counted so for all.
    assert 0.5 <= decoder.pages * decoder.page_bytes / (megabytes << 20) <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_without_room_for_a_page_is_an_error_that_says_how_much_it_needs(
    load: Load, precision: Precision
) -> None:
    decoder = load(precision)
    with pytest.raises(SettingsError, match="A key-value cache of 0 MB is too small for the tiny model") as caught:
        load(precision, cache_bytes=CANARY_PAGES * decoder.page_bytes)
    least = re.search(r"Set kv_cache_mb to (\d+) or more", str(caught.value))
    assert least
    assert load(precision, cache_bytes=int(least[1]) << 20).pages > CANARY_PAGES


def test_a_small_cache_makes_the_context_shorter(load: Load, tiny_base: Path) -> None:
    decoder = load("float32", cache_bytes=96 << 10)
    tokenizer = load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))
    engine = Engine(decoder, tokenizer)
    room = engine.room()
    assert 0 < room < decoder.shape.context
    assert len(collect(engine.generate([5] * (room - 4), sampling=Sampling(max_tokens=4))).tokens) == 4
    with pytest.raises(ContextTooLong, match=rf"{room} fit.*kv_cache_mb"):
        engine.generate([5] * room, sampling=Sampling(max_tokens=4))
    engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_that_no_machine_has_is_an_error(load: Load, precision: Precision) -> None:
    with pytest.raises(ModelUnavailable, match=r"too little memory.*kv_cache_mb"):
        load(precision, cache_bytes=1 << 50)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_there_are_as_many_slots_as_were_asked_for(load: Load, precision: Precision) -> None:
    assert load(precision, adapter_slots=3).slots == 3


def test_the_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    assert cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_torch_gets_the_threads() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (1, 0):
            limit_threads(threads)
            assert torch.get_num_threads() == (threads or cores())
    finally:
        torch.set_num_threads(before)


def test_settings_reach_the_model(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home", kv_cache_mb=16, adapter_slots=1, max_rows=2, precision="bfloat16")
    serving = Serving(settings)
    stats = serving.snapshot().host.engine.stats()
    serving.close()
    assert 0 < stats.cache_bytes <= 16 << 20


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"base_model": "hf:nobody/nothing"}])
def test_what_cannot_be_opened_is_a_sentence(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CollegiumError):
        Serving(make_settings(tmp_path / "home", **change))
