"""Tiny random models and adapters for tests of the decoders, and what transformers and PEFT make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collegium.experts.artifacts import ArtifactStore
from collegium.experts.engine.batch import PAGE, Batch, Decoder, Floats
from collegium.experts.engine.load import open_engine
from collegium.experts.kinds import Host
from collegium.experts.pool import ModelPool
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.chat import ChatEncoder
from collegium.models.load import load_tokenizer
from collegium.settings import Settings

VOCAB = 97
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 37)]
"""A prompt over more than two pages."""


def tiny_lm(folder: Path, architecture: str = "LlamaForCausalLM", *, seed: int = 0, **config: Any) -> Path:
    """Save a random model of two layers; no norm is one and no bias zero. `config` goes to its configuration."""
    import torch
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": False, "initializer_range": 0.2}
    if architecture == "Qwen2ForCausalLM":
        del sizes["head_dim"]  # its configuration has none
    torch.manual_seed(seed)
    model_type: Any = getattr(transformers, architecture)
    model = model_type(model_type.config_class(**sizes | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return folder


def tiny_lora(folder: Path, base: Path, *, seed: int = 1, dtype: str = "float32", **config: Any) -> Path:
    """Save a random adapter of the model in `base`, whose B is not zero. `config` goes to its LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    wanted: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4} | config
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**wanted))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.nn.init.normal_(weight, std=0.3).to(getattr(torch, dtype))
    model.save_pretrained(str(folder))
    return folder


@contextmanager
def hosting(model: CachedModel, folder: Path, **settings: Any) -> Iterator[Host]:
    """A host in float32 on a model, with what experts need in `folder`."""
    common: dict[str, Any] = {"device": "cpu", "precision": "float32", "threads": 1}
    known = Settings(**common | {"kv_cache_mb": 16, "max_prompt_tokens": 400} | settings)
    tokenizer = load_tokenizer(model)
    engine = open_engine(model, known, tokenizer)
    store, cache = ArtifactStore(folder / "store"), ModelCache(folder / "models")
    pool = ModelPool(engine, model, tokenizer, cache, store, known)
    try:
        yield Host(engine, ChatEncoder(tokenizer), store, model.identity, pool, known)
    finally:
        engine.close()


def reference(base: Path, adapter: Path | None = None, *, dtype: str = "float32") -> Callable[[Sequence[int]], Floats]:
    """A function from tokens to their logits [T, vocab], by transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))

    def logits(tokens: Sequence[int]) -> Floats:
        with torch.inference_mode():
            found: Floats = model.eval()(torch.tensor([list(tokens)])).logits[0].float().numpy()
            return found

    return logits


@dataclass
class Row:
    """A sequence that is being fed to a decoder."""

    tokens: Sequence[int]
    pages: Sequence[int]
    slot: int = 0
    done: int = 0


def feed(decoder: Decoder, rows: Sequence[Row], counts: Sequence[int]) -> list[Floats]:
    """Feed each row's next tokens in one batch; returns the logits of each [count, vocab]."""
    order = sorted(range(len(rows)), key=lambda at: rows[at].slot)
    pages = np.zeros((len(rows), max(len(row.pages) for row in rows)), np.int32)
    tokens: list[int] = []
    positions: list[int] = []
    for place, at in enumerate(order):
        row = rows[at]
        pages[place, : len(row.pages)] = row.pages
        tokens += row.tokens[row.done : row.done + counts[at]]
        positions += range(row.done, row.done + counts[at])
        row.done += counts[at]
    lengths = [counts[at] for at in order]
    logits = decoder.forward(
        Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence=np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
            pages=pages,
            slots=np.array([rows[at].slot for at in order], np.int32),
            wanted=np.arange(len(tokens), dtype=np.int32),
        )
    )
    parts = dict(zip(order, np.split(logits, np.cumsum(lengths)[:-1]), strict=True))
    return [parts[at] for at in range(len(rows))]


def run(decoder: Decoder, tokens: Sequence[int], slot: int = 0, chunk: int = 0, first_page: int = 0) -> Floats:
    """Logits [T, vocab] of one sequence, fed `chunk` tokens at a time (0: all at once) into pages that do not lie in order."""
    needed = -(-len(tokens) // PAGE)
    row = Row(tokens, [first_page + page for page in reversed(range(needed))], slot)
    found = []
    while row.done < len(tokens):
        found += feed(decoder, [row], [min(chunk or len(tokens), len(tokens) - row.done)])
    return np.concatenate(found)
