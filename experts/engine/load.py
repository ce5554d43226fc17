"""From settings to an engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ...errors import ModelUnavailable, SettingsError
from ...models.cache import CachedModel
from ...models.load import Precision, cores, limit_threads, load_tokenizer, pick_device, pick_dtype
from ...settings import Settings
from .batch import MOST_PROMPT_TOKENS, PAGE, Decoder
from .canary import CANARY_PAGES
from .dense import DenseDecoder
from .engine import Engine
from .int8 import Int8Decoder
from .kernels import VECTOR, round_up, too_large
from .native import library
from .shape import read_shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BFLOAT16_BYTES = 2


def open_engine(model: CachedModel, settings: Settings, tokenizer: PreTrainedTokenizerFast | None = None) -> Engine:
    """An engine on a cached model, as the settings say. Raises what `load_decoder` raises."""
    decoder = open_decoder(model, settings)
    return Engine(decoder, tokenizer or load_tokenizer(model), max_rows=settings.max_rows, max_queue=settings.max_queue)


def open_decoder(model: CachedModel, settings: Settings) -> Decoder:
    """A decoder of a cached model, as the settings say. Raises what `load_decoder` raises."""
    limit_threads(settings.threads)
    return load_decoder(
        model,
        precision=settings.precision,
        device=pick_device(settings.device),
        threads=settings.threads,
        max_rows=settings.max_rows,
        cache_bytes=settings.kv_cache_mb << 20,
        adapter_slots=settings.adapter_slots,
    )


def load_decoder(
    model: CachedModel,
    *,
    precision: Precision = "auto",
    device: torch.device,
    threads: int = 0,
    max_rows: int = 32,
    cache_bytes: int = 1 << 30,
    adapter_slots: int = 32,
) -> Decoder:
    """The decoder of a cached model, for `max_rows` sequences at once, with `threads` (0 for the cores that there are).

    `auto` is int8 on a CPU where there is a C compiler, else what `pick_dtype` takes. Raises UnsupportedModel where the
    model is not of a kind that it knows, ModelUnavailable where int8 is asked for and cannot be had or memory is short,
    SettingsError where settings do not go together.
    """
    import torch

    if _takes_int8(precision, device):
        pages = _pages(model, cache_bytes, BFLOAT16_BYTES)
        most = max_rows + MOST_PROMPT_TOKENS
        return Int8Decoder(model.folder, pages=pages, slots=adapter_slots, most_tokens=most, threads=threads or cores())
    dtype = pick_dtype(precision, device)
    pages = _pages(model, cache_bytes, dtype.itemsize)
    try:
        return DenseDecoder(model.folder, device=device, dtype=dtype, pages=pages, slots=adapter_slots)
    except (MemoryError, torch.OutOfMemoryError):
        raise too_large() from None


def _takes_int8(precision: Precision, device: torch.device) -> bool:
    if device.type != "cpu":
        if precision == "int8":
            raise SettingsError("int8 runs on the CPU alone.", hint="Set device to cpu, or precision to bfloat16.")
        return False
    if precision == "auto":
        try:
            library()
        except ModelUnavailable as error:
            log.warning("%s The model runs without int8, several times slower.", error)
            return False
    return precision in ("int8", "auto")


def _pages(model: CachedModel, cache_bytes: int, value_bytes: int) -> int:
    """How many pages the cache holds within `cache_bytes`, those for canaries included."""
    shape = read_shape(model.folder)
    wide = round_up(shape.head_dim, VECTOR)  # int8 keeps values in whole vectors
    page_bytes = shape.cached_values // shape.head_dim * wide * value_bytes * PAGE
    pages = cache_bytes // page_bytes
    if pages <= CANARY_PAGES:
        least, thousand = (-(-bytes_ >> 20) for bytes_ in ((CANARY_PAGES + 1) * page_bytes, 1000 * page_bytes // PAGE))
        raise SettingsError(
            f"A key-value cache of {cache_bytes >> 20} MB is too small for {model.name}.",
            hint=f"Set kv_cache_mb to {least} or more; a thousand tokens take {thousand} MB.",
        )
    return pages
