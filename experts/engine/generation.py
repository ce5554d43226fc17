"""A running answer, between the engine's thread and whoever asked."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

from ...errors import CollegiumError
from ...schema import Delta, Paid

log = logging.getLogger(__name__)

Item = Delta | CollegiumError
"""What the engine hands over: a piece of the answer, or why there is none."""


class Generation:
    """A running answer: iterate over its deltas, or `listen` to them; `close` stops it, and calls `notify`.

    Whoever answers says in `mode` how, where that differs from what its expert is called, and in `paid` what it cost elsewhere;
    both are final with the last delta.
    """

    def __init__(self, prompt_tokens: int, notify: Callable[[], None] = lambda: None) -> None:
        self.prompt_tokens = prompt_tokens
        self.cancelled = threading.Event()
        self.mode: str | None = None
        self.paid: Paid | None = None
        self._notify = notify
        self._deltas: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._take: Callable[[Item], None] = self._deltas.put
        self._lock = threading.Lock()
        self._ended = False

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come, the last one with a finish reason; none after it. Raises what the engine raised."""
        while not self._ended:
            item = self._deltas.get()
            if isinstance(item, CollegiumError):
                self._ended = True
                raise item
            self._ended = item.finish_reason is not None
            yield item

    def listen(self, listener: Callable[[Item], None]) -> None:
        """Call `listener` from the engine's thread with each delta, or the error, instead of keeping them.

        Everybody waits for it: it should only hand on. Where it raises, the answer is stopped.
        """
        with self._lock:
            while not self._deltas.empty():
                listener(self._deltas.get())
            self._take = listener

    def close(self) -> None:
        """Stop generating before the next token."""
        self.cancelled.set()
        self._notify()

    def put(self, item: Item) -> None:
        """Called by the engine."""
        with self._lock:
            try:
                self._take(item)
            except Exception:  # the edge of the thread: whose listener it was fails, and nobody else
                log.exception("a listener failed")
                self.cancelled.set()
