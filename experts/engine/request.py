"""What is asked of the engine: an expert is a formula over rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import InvalidRequest
from ...schema import Sampling
from .batch import Floats
from .combine import Combiner, Identity
from .sampling import Mask
from .slots import Adapter

BASE = "base"
"""The name of the model that every engine has."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence on one model of the engine, with one adapter or none."""

    prompt: Sequence[int]
    adapter: Adapter | None = None
    model: str = BASE


class RemoteRow(Protocol):
    """One sequence that somebody else computes."""

    def logits(self, generated: Sequence[int]) -> Future[Floats]:
        """Start to work out the logits `[vocab]` that follow the row's prompt and `generated`; must not block."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer: every row reads the token that is drawn from what `combiner` makes of their logits.

    With `forced`, these tokens are taken instead of drawn ones, each with its log-probability: a given answer is scored.
    """

    rows: tuple[Row | RemoteRow, ...]
    combiner: Combiner = field(default_factory=Identity)
    sampling: Sampling = field(default_factory=Sampling)
    masks: tuple[Mask, ...] = ()
    seed: int | None = None
    deadline: float | None = None
    """In `time.monotonic()` seconds."""
    forced: tuple[int, ...] = ()

    @property
    def local(self) -> list[Row]:
        """The rows on models of the engine."""
        return [row for row in self.rows if isinstance(row, Row)]

    @property
    def remote(self) -> bool:
        """Whether it leans on rows that somebody else computes."""
        return len(self.local) < len(self.rows)

    @property
    def new_tokens(self) -> int:
        """The longest answer."""
        return len(self.forced) or self.sampling.max_tokens

    def check(self, most_rows: int) -> None:
        """Raises InvalidRequest where it could never run, whatever the models."""
        rows, taken = len(self.rows), self.combiner.rows
        if rows != taken:
            raise InvalidRequest(f"The request has {rows} rows, its combiner takes {taken}.", hint="Give as many.")
        if rows > most_rows:
            raise InvalidRequest(f"The request has {rows} rows, {most_rows} run at once.", hint="Raise max_rows.")
        if not self.local:
            raise InvalidRequest("No row is on a model of the engine.", hint="Give at least one.")
        if self.new_tokens < 1:
            raise InvalidRequest("The answer may have no tokens.", hint="Set max_tokens to at least 1.")
