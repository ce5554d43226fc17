"""PEFT on transformers, as people use it: the engine's nearest rival.

It runs in a process of its own: once two threads of one process have used torch, its OpenMP threads no longer wait busily for
work, and PEFT would lose a quarter of its speed to the engine's mere presence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from workload import NEW_TOKENS, AdapterFolder

from collegium.models.cache import CachedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Work = Literal["mixed", "one_by_one", "first_token"]


class Peft:
    """Models with adapters in a child process, one a type of weights."""

    def __init__(self, base: CachedModel, adapters: Sequence[AdapterFolder], threads: int) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_open, initargs=(base, adapters, threads)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def measure(
        self, dtype: str, work: Work, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder]
    ) -> float:
        """What the method `work` of `AdaptedModel` says."""
        return self._pool.submit(_measure, dtype, work, prompts, adapters).result()


class AdaptedModel:
    """A transformers model with adapters by PEFT, their weights of the model's type."""

    def __init__(self, base: CachedModel, adapters: Sequence[AdapterFolder], dtype: torch.dtype) -> None:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
        first, *rest = adapters
        # PEFT would keep bfloat16 adapters as float32, which is slower.
        adapted = PeftModel.from_pretrained(model, str(first.folder), first.name, autocast_adapter_dtype=False)
        for adapter in rest:
            adapted.load_adapter(str(adapter.folder), adapter.name, autocast_adapter_dtype=False)
        self._model: Any = adapted.to(dtype).eval()
        self._pad = int(model.config.eos_token_id)

    def mixed(self, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder]) -> float:
        """Tokens/s of `generate(adapter_names=...)`: all requests in one batch, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        names = [adapter.name for adapter in adapters]
        start = time.perf_counter()
        self._generate(ids, mask, NEW_TOKENS, adapter_names=names)
        return float(len(prompts) * NEW_TOKENS / (time.perf_counter() - start))

    def one_by_one(self, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder]) -> float:
        """Tokens/s of `set_adapter` and `generate` for each request in turn."""
        return float(len(prompts) * NEW_TOKENS / self._alone(prompts, adapters, NEW_TOKENS))

    def first_token(self, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder]) -> float:
        """Milliseconds to the first token of a request, the mean of several."""
        return 1000 * self._alone(prompts, adapters, 1) / len(prompts)

    def _alone(self, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder], tokens: int) -> float:
        start = time.perf_counter()
        for prompt, adapter in zip(prompts, adapters, strict=True):
            self._model.set_adapter(adapter.name)
            ids = torch.tensor([list(prompt)])
            self._generate(ids, torch.ones_like(ids), tokens)
        return time.perf_counter() - start

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, **options: Any) -> None:
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=self._pad,
                **options,
            )
        assert out.shape[1] == ids.shape[1] + tokens


_MODELS: dict[str, AdaptedModel] = {}  # of the child process


def _open(base: CachedModel, adapters: Sequence[AdapterFolder], threads: int) -> None:
    torch.set_num_threads(threads)
    _MODELS.update({name: AdaptedModel(base, adapters, dtype) for name, dtype in DTYPES.items()})


def _measure(dtype: str, work: Work, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder]) -> float:
    figure: float = getattr(_MODELS[dtype], work)(prompts, adapters)
    return figure
