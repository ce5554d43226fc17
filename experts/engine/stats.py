"""What an engine is doing, for reports."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from .model import Model


@dataclass(frozen=True, slots=True)
class Stats:
    """A look at an engine; of all its models together."""

    running: int
    """Requests, and so `waiting`."""
    waiting: int
    adapters: int
    """In slots, of which requests that run use `adapters_used`."""
    adapters_used: int
    pages: int
    """Of the key-value caches: `pages_used` by requests that run, `pages_cached` for those that may begin alike."""
    pages_used: int
    pages_cached: int
    cache_bytes: int
    """Of the key-value caches when full."""
    prompt_tokens: int
    """Read since the start, of which `reused_tokens` needed no computation."""
    reused_tokens: int

    @classmethod
    def of(cls, models: Collection[Model], running: int, waiting: int) -> Self:
        """Add up what the models say."""
        return cls(
            running=running,
            waiting=waiting,
            adapters=sum(len(model.slots.resident) for model in models),
            adapters_used=sum(model.slots.used for model in models),
            pages=sum(model.pool.pages for model in models),
            pages_used=sum(model.pool.used for model in models),
            pages_cached=sum(model.pool.cached for model in models),
            cache_bytes=sum(model.decoder.pages * model.decoder.page_bytes for model in models),
            prompt_tokens=sum(model.pool.asked for model in models),
            reused_tokens=sum(model.pool.hits for model in models),
        )
