"""The default model with the shipped adapters: float32 answers are those of transformers and PEFT, int8 ones their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import collegium
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.load import load_decoder
from collegium.experts.engine.slots import Adapter
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.chat import ChatEncoder
from collegium.models.load import load_tokenizer
from collegium.schema import Message, Sampling
from collegium.settings import DEFAULT_BASE
from collegium.tests.engine_doubles import MARGIN, Answer, collect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from collegium.models.load import Precision

pytestmark = pytest.mark.models
QUESTION = "What is the capital of France, and what should I see there?"
OTHER = "Why is the sky blue?"
SHIPPED = Path(str(collegium.__file__)).parent / "shipped" / "artifacts"


@pytest.fixture
def model(real_home: Path) -> CachedModel:
    return ModelCache(real_home / "models").get(DEFAULT_BASE)


@pytest.fixture
def tokenizer(model: CachedModel) -> PreTrainedTokenizerFast:
    return load_tokenizer(model)


@pytest.fixture
def experts() -> dict[str, Adapter | None]:
    """None for the base, and every adapter that ships."""
    folders = sorted(path.parent for path in SHIPPED.glob("*/adapter_model.safetensors"))
    assert len(folders) >= 5
    return {"base": None, **{folder.name[:6]: Adapter(folder.name, folder) for folder in folders}}


def open_engine(model: CachedModel, tokenizer: PreTrainedTokenizerFast, precision: Precision) -> Engine:
    import torch

    decoder = load_decoder(model, precision=precision, device=torch.device("cpu"), cache_bytes=1 << 28, adapter_slots=8)
    return Engine(decoder, tokenizer)


def ask_all(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, experts: Mapping[str, Adapter | None], sampling: Sampling
) -> dict[tuple[str, str], Answer]:
    """Eight requests at once: one of each expert, and some more."""
    encode = ChatEncoder(tokenizer).encode
    keys = [(name, QUESTION) for name in experts] + [(name, OTHER) for name in list(experts)[:2]]
    running = {
        key: engine.generate(encode([Message("user", key[1])]), adapter=experts[key[0]], sampling=sampling, seed=7)
        for key in keys
    }
    return {key: collect(generation, 120) for key, generation in running.items()}


def test_int8_answers_are_the_same_alone_and_together(
    model: CachedModel, tokenizer: PreTrainedTokenizerFast, experts: Mapping[str, Adapter | None]
) -> None:
    sampling = Sampling(max_tokens=24, temperature=0.8, logprobs=1)
    with closing(open_engine(model, tokenizer, "int8")) as engine:
        together = ask_all(engine, tokenizer, experts, sampling)
    assert len({answer.tokens for answer in together.values()}) == len(together)
    ids = ChatEncoder(tokenizer).encode([Message("user", QUESTION)])
    with closing(open_engine(model, tokenizer, "int8")) as engine:
        for name, adapter in experts.items():
            alone = collect(engine.generate(ids, adapter=adapter, sampling=sampling, seed=7))
            assert alone == together[name, QUESTION]
        greedy = collect(engine.generate(ids, sampling=Sampling(max_tokens=30)))
        assert "Paris" in greedy.text


@pytest.fixture
def by_peft(model: CachedModel, experts: Mapping[str, Adapter | None]) -> Callable[[str, Sequence[int]], Floats]:
    """A function from an expert and tokens to logits [T, vocab], by transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    for name, adapter in experts.items():
        if isinstance(lm, PeftModel):
            assert adapter
            lm.load_adapter(str(adapter.folder), name)
        elif adapter:
            lm = PeftModel.from_pretrained(lm, str(adapter.folder), name)
    lm.eval()

    def logits(name: str, tokens: Sequence[int]) -> Floats:
        with torch.inference_mode():
            if name == "base":
                with lm.disable_adapter():
                    return lm(torch.tensor([list(tokens)])).logits[0].numpy()  # type: ignore[no-any-return]
            lm.set_adapter(name)
            return lm(torch.tensor([list(tokens)])).logits[0].numpy()  # type: ignore[no-any-return]

    return logits


def test_float32_answers_are_those_of_transformers_and_peft(
    model: CachedModel,
    tokenizer: PreTrainedTokenizerFast,
    experts: Mapping[str, Adapter | None],
    by_peft: Callable[[str, Sequence[int]], Floats],
) -> None:
    """Each token is the one that they would have chosen after those before it, which is what their greedy search is."""
    with closing(open_engine(model, tokenizer, "float32")) as engine:
        found = ask_all(engine, tokenizer, experts, Sampling(max_tokens=24))
        ids = ChatEncoder(tokenizer).encode([Message("user", QUESTION)])
        alone = {name: collect(engine.generate(ids, adapter=experts[name], sampling=Sampling(8))) for name in experts}
    for name, answer in alone.items():
        assert found[name, QUESTION].tokens[:8] == answer.tokens
    for (name, question), answer in found.items():
        prompt = ChatEncoder(tokenizer).encode([Message("user", question)])
        logits = by_peft(name, [*prompt, *answer.tokens])[len(prompt) - 1 :]
        said = [*answer.tokens, *([tokenizer.eos_token_id] if answer.reason == "stop" else [])]
        assert len(said) == 24 or answer.reason == "stop"
        behind = logits.max(1)[: len(said)] - logits[np.arange(len(said)), said]
        assert (behind <= MARGIN).all(), f"{name} parts at token {int(behind.argmax())}"
