"""A canary says what transformers and PEFT make of an adapter, whatever type the base model is stored in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collegium.errors import InvalidRequest
from collegium.experts.engine.canary import MOST_TOKENS
from collegium.experts.home import Home
from collegium.experts.probe import make_canary
from collegium.models.cache import CachedModel
from collegium.schema import Canary, Lora
from collegium.settings import Settings
from collegium.tests.engine_models import reference, tiny_lora


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> CachedModel:
    return CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")


def stored_as(dtype: str, base: CachedModel, folder: Path) -> CachedModel:
    """The same model with its weights in another type."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(base.folder, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return CachedModel("stored", folder, base.architecture, "stored")


def expected(folder: Path, adapter: Path | None, canary: Canary) -> np.ndarray[Any, Any]:
    """The canary's numbers, from a model whose weights are float32 as a whole."""
    logits = reference(folder, adapter)(canary.tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found: np.ndarray[Any, Any] = np.take_along_axis(logprobs, np.reshape(canary.ids, (len(logits), -1)), 1).ravel()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_what_transformers_and_peft_compute_in_float32(dtype: str, base: CachedModel, tmp_path: Path) -> None:
    stored = stored_as(dtype, base, tmp_path / "base")
    options: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    adapter = tiny_lora(tmp_path / "adapter", base.folder, dtype="bfloat16", **options)
    canary = make_canary(adapter, stored)
    np.testing.assert_allclose(canary.logprobs, expected(stored.folder, adapter, canary), atol=2e-4)
    np.testing.assert_allclose(canary.base, expected(stored.folder, None, canary), atol=2e-4)


def test_it_notes_after_each_token_the_likeliest_and_the_most_changed(
    base: CachedModel, adapters: Mapping[str, Path]
) -> None:
    canary = make_canary(adapters["law"], base)
    tuned, plain = (reference(base.folder, one)(canary.tokens) for one in (adapters["law"], None))
    change = np.abs(tuned - plain - (np.log(np.exp(tuned).sum(1)) - np.log(np.exp(plain).sum(1)))[:, None])
    likeliest, changed = np.reshape(canary.ids, (-1, 2)).T
    np.testing.assert_array_equal(likeliest, tuned.argmax(1))
    np.put_along_axis(change, likeliest[:, None], -1, 1)
    np.testing.assert_array_equal(changed, change.argmax(1))
    assert 1 < len(canary.tokens) <= MOST_TOKENS
    assert len(canary.logprobs) == len(canary.base) == len(canary.ids)
    assert astuple(canary) == astuple(make_canary(adapters["law"], base))


def test_an_adapter_that_breaks_the_model_is_refused(base: CachedModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny_lora(tmp_path / "adapter", base.folder) / "adapter_model.safetensors"
    save_file({name: one * np.float32(1e30) for name, one in load_file(path).items()}, path)
    with pytest.raises(InvalidRequest, match="no finite numbers"):
        make_canary(tmp_path / "adapter", base)


@pytest.mark.models
@pytest.mark.slow
def test_the_shipped_canaries_are_those_of_the_shipped_adapters(real_home: Path) -> None:
    with Home(Settings(home=real_home)) as home:
        base = home.models.get(home.settings.base_model)
        cards = [card for card in home.cards(home.release()).values() if isinstance(card.spec, Lora)]
        assert len(cards) == 5
        for card in cards:
            assert isinstance(card.spec, Lora)
            found, shipped = make_canary(home.artifacts.verify(card.spec.adapter), base), card.evidence.canary
            assert shipped
            assert (found.tokens, found.ids) == (shipped.tokens, shipped.ids)
            np.testing.assert_allclose(found.logprobs, shipped.logprobs, atol=2e-3)
            np.testing.assert_allclose(found.base, shipped.base, atol=2e-3)
