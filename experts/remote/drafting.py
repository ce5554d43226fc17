"""Tokens that the small expert expects, for the server to verify in one request.

Speculative decoding (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding") to save requests:
what is drawn follows from the server's distributions alone, a draft only says for which tokens to ask them ahead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

from ...errors import ContextTooLong, Overloaded
from ...schema import Sampling
from ..engine.engine import Engine
from ..engine.request import Request, Row
from .listening import deltas

PATIENCE = 1.0
"""Seconds that a draft may take. One that takes longer, or finds no place in the queue, is the last of its answer."""


class Drafter:
    """Drafts for one answer: more while all of a draft is drawn, fewer where it is not."""

    def __init__(self, engine: Engine, row: Row, sampling: Sampling, most: int) -> None:
        self._engine, self._row, self._most = engine, row, most
        self._sampling = replace(sampling, temperature=0.0, stop=(), logprobs=None, min_tokens=0)
        self._length, self._room = most, sampling.max_tokens
        self._draft: tuple[int, ...] = ()
        self._at = 0  # tokens of the answer before the draft

    async def draft(self, generated: Sequence[int]) -> tuple[int, ...]:
        """Tokens that may follow; none where the small expert has no time or would end. The answer's last needs none."""
        self._learn(generated)
        length = min(self._length, self._room - len(generated) - 1)
        self._at, self._draft = len(generated), ()
        if length > 0:
            try:
                self._draft = await self._ask(generated, length)
            except (Overloaded, ContextTooLong):
                self._length = 0
        return self._draft

    async def _ask(self, generated: Sequence[int], length: int) -> tuple[int, ...]:
        row = replace(self._row, prompt=[*self._row.prompt, *generated])
        asked = replace(self._sampling, max_tokens=length)
        found: list[int] = []
        generation = self._engine.submit(Request((row,), sampling=asked, deadline=time.monotonic() + PATIENCE))
        async with contextlib.aclosing(deltas(generation)) as drawn:
            async for delta in drawn:
                found += delta.token_ids
                if delta.finish_reason == "cancelled":
                    self._length = 0  # others need the engine
        return tuple(found)

    def _learn(self, generated: Sequence[int]) -> None:
        if self._draft and self._length:
            kept = tuple(generated[self._at : self._at + len(self._draft)]) == self._draft
            self._length = min(self._most, 2 * self._length) if kept else max(1, self._length // 2)
