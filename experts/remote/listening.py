"""A running answer of the engine, as an asynchronous generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from ...errors import CollegiumError
from ...schema import Delta
from ..engine.generation import Generation, Item


async def deltas(generation: Generation) -> AsyncGenerator[Delta, None]:
    """Deltas as they come, the last one with a finish reason. Raises what the engine raised. Closes it, however it ends."""
    loop, items = asyncio.get_running_loop(), asyncio.Queue[Item]()

    def hand_over(item: Item) -> None:
        loop.call_soon_threadsafe(items.put_nowait, item)

    generation.listen(hand_over)
    try:
        while True:
            item = await items.get()
            if isinstance(item, CollegiumError):
                raise item
            yield item
            if item.finish_reason:
                return
    finally:
        generation.close()
