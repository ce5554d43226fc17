"""A circuit breaker for each model of each server (Nygard 2007, "Release It!"): one that is down is not asked over and over."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...errors import RemoteUnavailable
from .failures import Failed

if TYPE_CHECKING:
    from pybreaker import CircuitBreaker

FAILURES = 5
"""In a row, after which it opens."""
PAUSE = 30.0
"""Seconds that it stays open."""


class Breaker:
    """Counts failures of one model of one server, and fails at once while it is open."""

    def __init__(self, name: str) -> None:
        from pybreaker import CircuitBreaker

        self._name, self._opened = name, 0.0
        self._breaker: CircuitBreaker = CircuitBreaker(
            fail_max=FAILURES,
            reset_timeout=PAUSE,
            exclude=[lambda error: not (isinstance(error, Failed) and error.counts)],
            throw_new_error_on_trip=False,
        )

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around one request. Raises RemoteUnavailable while the breaker is open."""
        from pybreaker import CircuitBreakerError

        try:
            with self._breaker.calling():
                yield
        except CircuitBreakerError:
            left = max(0.0, self._opened + PAUSE - time.monotonic())
            raise RemoteUnavailable(
                f"{self._name} has failed {FAILURES} times in a row and is left alone for now.",
                hint=f"It is tried again in {left:.0f} s.",
            ) from None
        except Failed:
            if self._breaker.current_state == "open":
                self._opened = time.monotonic()
            raise


_BREAKERS: dict[tuple[str, str], Breaker] = {}
_LOCK = threading.Lock()


def breaker(url: str, model: str) -> Breaker:
    """The one for a model of a server; all answers of the process share it."""
    with _LOCK:
        return _BREAKERS.setdefault((url, model), Breaker(f"{model} at {url}"))
