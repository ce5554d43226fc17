"""What a request to a server may cost, and what its failure says about the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RemoteUnavailable
from ...schema import Paid
from ...settings import Settings


class Failed(Exception):
    """A request that failed: `error` for the user, `pause` in seconds where the server asks for one.

    `counts` says that the server itself failed, which opens its circuit breaker in time.
    """

    def __init__(self, error: RemoteUnavailable, *, pause: float | None = None, counts: bool = False) -> None:
        super().__init__(error.message)
        self.error, self.pause, self.counts = error, pause, counts

    def again(self, settings: Settings) -> bool:
        """Whether to ask again: not where the server asks for a pause that nobody would wait for."""
        return self.pause is None or self.pause <= settings.remote_timeout


@dataclass(slots=True)
class Spent:
    """What one answer has cost so far. `limit` is the most requests."""

    limit: int
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def call(self) -> None:
        """One more request. Raises RemoteUnavailable where that is too many."""
        if self.calls >= self.limit:
            raise RemoteUnavailable(
                f"This answer has cost {self.calls} requests, the most that the setting remote_calls allows.",
                hint="Raise it, or ask for a shorter answer.",
            )
        self.calls += 1

    def take(self, reply: Mapping[str, Any] | None) -> None:
        """What a server says it has read and written, in OpenAI's words or llama.cpp's."""
        usage = (reply or {}).get("usage")
        said = usage if isinstance(usage, Mapping) else reply or {}
        self.prompt_tokens += _count(said.get("prompt_tokens") or said.get("tokens_evaluated"))
        self.completion_tokens += _count(said.get("completion_tokens") or said.get("tokens_predicted"))

    @property
    def paid(self) -> Paid:
        """As the reply has it."""
        return Paid(self.calls, self.prompt_tokens, self.completion_tokens, self.drafted, self.accepted)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
