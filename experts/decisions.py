"""The log of what the router decided. A thread writes it in batches, so that no prompt waits for a disk.

A row holds the embedding that the decision rests on, so that another router can be asked what it would have decided
(`router/replay.py`); the prompt's text only where settings say so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError

from ..errors import CollegiumError
from ..schema import Decision
from .database import translated, writing
from .registry import Registry
from .tables import decisions

BATCH = 64
"""Rows of one transaction, at most."""
EVERY = 1.0
"""Seconds that a row waits for others to be written with."""
WAITING = 1024
"""Rows that wait for a database which is slow or out of reach; of more, the oldest are lost."""
SWEEP = 3600.0
"""Seconds between looking for rows that are too old."""
CLOSING = 5.0
"""Seconds that `close` waits for the last rows."""

log = logging.getLogger(__name__)
_FAILURES = (CollegiumError, SQLAlchemyError)


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """A decision on its way into the log.

    `embedding` [dimension] is what it rests on, `encoder` the identity of what made it, `release` the id of the release that
    decided, `text` what was routed; `domains` are those that the caller limited the choice to.
    """

    decision: Decision
    embedding: NDArray[np.float32]
    encoder: str
    release: int
    text: str
    created: datetime = field(default_factory=partial(datetime.now, UTC))
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A decision in the log: as `Logged`, the embedding rounded to float16, and `text` None where prompts are not kept.

    `prompt_hash` is the SHA-256 of the routed text.
    """

    decision: Decision
    embedding: NDArray[np.float32]
    encoder: str
    release: int
    text: str | None
    created: datetime
    domains: tuple[str, ...] | None
    prompt_hash: str


class DecisionLog:
    """Takes decisions from any thread; `close` it to write the last ones.

    `days` is how long rows are kept. The first decision starts the thread that writes, and that deletes what is too old.
    """

    def __init__(self, registry: Registry, *, keep_text: bool, days: int) -> None:
        self._engine = registry.engine
        self._keep_text = keep_text
        self._days = days
        self._changed = threading.Condition()
        self._waiting: deque[Logged] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._warned = False
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Decisions that were lost: too many waited, or the database refused them twice."""
        return self._dropped

    def put(self, logged: Logged) -> None:
        """Take a decision; returns at once and never raises. After `close` nothing is taken."""
        with self._changed:
            if self._closing:
                return
            overflow = len(self._waiting) == WAITING
            if overflow:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(logged)
            if len(self._waiting) in (1, BATCH):
                self._changed.notify()
            self._start()
            first, self._warned = overflow and not self._warned, self._warned or overflow
        if first:
            log.warning("decisions come faster than they are written: from now on the oldest that wait may be lost")

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSING)
            if self._thread.is_alive():
                log.warning("the database did not take the last decisions in time: %d may be lost", len(self._waiting))

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="decisions", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the system has no thread to give; the next decision asks again
                self._thread = None

    def _run(self) -> None:
        next_sweep = time.monotonic()
        while True:
            if time.monotonic() >= next_sweep:
                self._sweep()
                next_sweep = time.monotonic() + SWEEP
            batch = self._next_batch(next_sweep - time.monotonic())
            if batch:
                self._write(batch)
            elif self._closing:
                return

    def _next_batch(self, patience: float) -> list[Logged]:
        """What has come within `EVERY` of the first; nothing where none comes for `patience` seconds."""
        with self._changed:
            if self._changed.wait_for(lambda: self._waiting or self._closing, patience):
                self._changed.wait_for(lambda: len(self._waiting) >= BATCH or self._closing, EVERY)
            return [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]

    def _write(self, batch: Sequence[Logged]) -> None:
        try:
            self._insert(batch)
        except _FAILURES as error:
            log.warning("%d decisions were not written, which will be tried once more: %s", len(batch), error)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, EVERY)
            try:
                self._insert(batch)
            except _FAILURES as again:
                with self._changed:
                    self._dropped += len(batch)
                log.warning("%d decisions are lost: %s", len(batch), again)

    def _insert(self, batch: Sequence[Logged]) -> None:
        rows = [_to_row(one, keep_text=self._keep_text) for one in batch]
        with translated(), writing(self._engine) as connection:
            connection.execute(insert(decisions), rows)

    def _sweep(self) -> None:
        oldest = _iso(datetime.now(UTC) - timedelta(days=self._days))
        try:
            with translated(), writing(self._engine) as connection:
                connection.execute(delete(decisions).where(decisions.c.created < oldest))
        except _FAILURES as error:
            log.warning("decisions older than %d days were not deleted: %s", self._days, error)


def latest(registry: Registry, count: int, *, domain: str | None = None, since: datetime | None = None) -> list[Stored]:
    """The newest `count` decisions, newest first: of one domain, or from a moment on (with its time zone)."""
    query = select(decisions).order_by(decisions.c.created.desc(), decisions.c.id.desc()).limit(count)
    if domain is not None:
        query = query.where(decisions.c.domain == domain)
    if since is not None:
        query = query.where(decisions.c.created >= _iso(since))
    with translated(), registry.engine.connect() as connection:
        return [_from_row(row) for row in connection.execute(query)]


def _to_row(logged: Logged, *, keep_text: bool) -> dict[str, Any]:
    decision = logged.decision
    return {
        "created": _iso(logged.created),
        "prompt_hash": sha256(logged.text.encode()).hexdigest(),
        "embedding": logged.embedding.astype("<f2").tobytes(),
        "encoder": logged.encoder,
        "release": logged.release,
        "router": decision.router_version,
        "domain": decision.domain,
        "expert": decision.expert,
        "reason": decision.reason,
        "confidence": decision.confidence,
        "body": {
            "candidates": decision.candidates,
            "probabilities": dict(decision.probabilities),
            "prediction_set": decision.prediction_set,
            "threshold": decision.threshold,
            "domains": logged.domains,
        },
        "text": logged.text if keep_text else None,
    }


def _from_row(row: Row[Any]) -> Stored:
    body = row.body
    decision = Decision(
        domain=row.domain,
        candidates=tuple((expert, weight) for expert, weight in body["candidates"]),
        probabilities=body["probabilities"],
        prediction_set=tuple(body["prediction_set"]),
        confidence=row.confidence,
        reason=row.reason,
        threshold=body["threshold"],
        router_version=row.router,
    )
    return Stored(
        decision,
        np.frombuffer(row.embedding, "<f2").astype(np.float32),
        row.encoder,
        row.release,
        row.text,
        datetime.fromisoformat(row.created),
        None if body["domains"] is None else tuple(body["domains"]),
        row.prompt_hash,
    )


def _iso(moment: datetime) -> str:
    """In UTC and of one form, so that text sorts as time does."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
