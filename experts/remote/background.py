"""One asyncio loop a process, in a thread of its own, and one pool of connections: waiting for servers costs no thread each."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_STARTING = threading.Lock()
CLOSING = 2.0
"""Seconds that open connections may take to close when the process ends."""


def loop() -> asyncio.AbstractEventLoop:
    """The loop, started when it is first asked for."""
    with _STARTING:  # `cache` alone would let two threads start two
        return _start()


@cache
def _start() -> asyncio.AbstractEventLoop:
    started = asyncio.new_event_loop()
    threading.Thread(target=started.run_forever, name="collegium-remote", daemon=True).start()
    return started


def spawn(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the loop; cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(work, loop())


class Running:
    """A coroutine on the loop. `ended` is called there, whatever became of it."""

    def __init__(self, work: Coroutine[Any, Any, None], ended: Callable[[asyncio.Task[None]], None]) -> None:
        self._work, self._ended = work, ended
        self._task: asyncio.Task[None] | None = None
        loop().call_soon_threadsafe(self._begin)

    def cancel(self) -> None:
        """Stop it, from any thread; nothing happens where it has ended."""
        loop().call_soon_threadsafe(self._cancel)

    def _begin(self) -> None:
        self._task = loop().create_task(self._work)
        self._task.add_done_callback(self._ended)

    def _cancel(self) -> None:
        assert self._task is not None  # calls of the loop are made in their order
        self._task.cancel()


@cache
def connections() -> httpx.AsyncClient:
    """The client that all requests go through; called on the loop.

    It follows no redirect and takes nothing from the environment: no proxy, no password of ~/.netrc.
    """
    import httpx

    client = httpx.AsyncClient(follow_redirects=False, trust_env=False)

    def close() -> None:
        with contextlib.suppress(TimeoutError):
            spawn(client.aclose()).result(CLOSING)

    atexit.register(close)
    return client
