"""The thread that owns the models: requests join and leave its running batch between steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import CollegiumError, InvalidRequest, ModelUnavailable, Overloaded
from ...schema import FinishReason, Sampling
from .answering import Answering
from .batch import Decoder
from .generation import Generation
from .model import Model
from .request import BASE, Request, Row
from .slots import Adapter
from .stats import Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

ADMISSION = 0.01
"""Seconds after which no further request is started before a pass: reading an adapter stalls those who are answering."""


class Engine:
    """Continuous batching (Orca, Yu et al. 2022) over one or more local models, in a thread of its own.

    Whatever is said of a request is said by that thread: other threads only queue requests, mark them as cancelled, and wake it.
    """

    def __init__(
        self,
        models: Mapping[str, Decoder] | Decoder,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_rows: int = 32,
        max_queue: int = 64,
    ) -> None:
        """`max_rows` run at once and `max_queue` requests more may wait."""
        decoders = models if isinstance(models, Mapping) else {BASE: models}
        self._models = {name: Model(decoder) for name, decoder in decoders.items()}
        self._tokenizer = tokenizer
        self._max_rows, self._max_queue = max_rows, max_queue
        self._waiting: deque[Answering] = deque()
        self._running: list[Answering] = []
        self._closed = False
        self._stuck = False  # the first that waits has found no room, and nobody has left since
        self._wake = threading.Condition()  # for `_closed` and the two lists: only the thread takes out of them
        self._thread = threading.Thread(target=self._run, name="collegium-engine", daemon=True)
        self._thread.start()

    def room(self, model: str = BASE, rows: int = 1) -> int:
        """Tokens that a row can see on a model, prompt and answer together, where a request has `rows` on it."""
        return self._models[model].room(rows)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        adapter: Adapter | None = None,
        sampling: Sampling,
        seed: int | None = None,
        deadline: float | None = None,
    ) -> Generation:
        """Queue a request of one row on the base model. Raises what `submit` raises."""
        return self.submit(Request((Row(prompt, adapter),), sampling=sampling, seed=seed, deadline=deadline))

    def add(self, name: str, decoder: Decoder) -> None:
        """Have rows run on one more model, which is freed with the others.

        Raises InvalidRequest where one has this name, ModelUnavailable where the engine is closed; it stays the caller's then.
        """
        with self._wake:
            self._check_open()
            if name in self._models:
                raise InvalidRequest(f"A model is named {name!r} already.")
            self._models = {**self._models, name: Model(decoder)}  # the thread goes through the one that it began with

    def load(self, adapter: Adapter, model: str = BASE) -> None:
        """Have an adapter read and checked before it is asked for. Raises what that raises, and what `submit` raises."""
        for _ in self.submit(Request((Row([0], adapter, model),), sampling=Sampling(max_tokens=1))):
            pass

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises Overloaded where the queue is full, ContextTooLong or InvalidRequest where it can never run, ModelUnavailable
        where the engine is closed.
        """
        self._check(request)
        generation = Generation(len(request.local[0].prompt), self._notify)
        answering = Answering(request, generation, self._tokenizer, self._notify)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self._max_queue + self._free_rows():
                raise Overloaded(
                    f"{len(self._waiting)} requests are waiting already.", hint="Try again in a few seconds."
                )
            self._waiting.append(answering)
            self._wake.notify()
        return generation

    def stats(self) -> Stats:
        """A look at what the engine is doing."""
        with self._wake:
            running, waiting = len(self._running), len(self._waiting)
        return Stats.of(self._models.values(), running, waiting)

    def close(self) -> None:
        """Finish what runs, unless it leans on remote rows; cancel that and what waits; end the thread, free the models."""
        with self._wake:
            self._closed = True
            for answering in [*self._waiting, *(one for one in self._running if one.request.remote)]:
                answering.generation.cancelled.set()
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # a listener may close, too
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailable("The engine is closed.", hint="Open Collegium again.")

    def _check(self, request: Request) -> None:
        request.check(self._max_rows)
        for name in {row.model for row in request.local}:
            if name not in self._models:
                raise InvalidRequest(f"No model is named {name!r}.", hint=f"Known: {', '.join(self._models)}.")
            self._models[name].check([row for row in request.local if row.model == name], request)

    def _free_rows(self) -> int:
        return self._max_rows - sum(len(one.request.rows) for one in self._running)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop()
                self._admit()
                self._compute()
                self._advance()
        finally:
            self._end()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._wake:
            while not self._has_work():
                if self._closed and not self._running:
                    return False
                self._wake.wait(self._patience())
        return True

    def _has_work(self) -> bool:
        if any(one.active for one in self._running) or (not self._stuck and self._first()):
            return True
        return any(one.over for one in (*self._running, *self._waiting))

    def _patience(self) -> float | None:
        """Seconds to the next deadline."""
        deadlines = [one.request.deadline for one in (*self._running, *self._waiting)]
        soonest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if soonest is None else min(max(0.0, soonest - time.monotonic()), threading.TIMEOUT_MAX)

    def _drop(self) -> None:
        """Let go of what nobody wants any more."""
        with self._wake:
            waiting = [one for one in self._waiting if one.over]
            for answering in waiting:
                self._waiting.remove(answering)
                self._stuck = False
        for answering in waiting:
            answering.end("cancelled")
        for answering in [one for one in self._running if one.over]:
            self._leave(answering, "cancelled")

    def _admit(self) -> None:
        """Start what waits, up to the first that finds no room."""
        begun = time.monotonic()
        while not self._stuck and time.monotonic() - begun < ADMISSION:
            with self._wake:
                answering = self._first()
            if answering is None:
                return
            try:
                fits = len(answering.request.rows) <= self._free_rows()
                self._stuck = not (fits and answering.start(self._models))
            except Exception as error:  # the edge of the thread: the engine goes on
                with self._wake:
                    self._waiting.remove(answering)
                answering.generation.put(_as_error(error))
                continue
            if not self._stuck:
                with self._wake:
                    self._waiting.remove(answering)
                    self._running.append(answering)

    def _first(self) -> Answering | None:
        """Who comes next: the first that came and is still wanted.

        Those that lean on servers keep to half of the rows and let others pass.
        """
        remote = sum(len(one.request.rows) for one in self._running if one.request.remote)
        for one in self._waiting:
            held = one.request.remote and remote and remote + len(one.request.rows) > self._max_rows // 2
            if not (one.over or held):
                return one
        return None

    def _compute(self) -> None:
        """One pass through each model that has rows to compute. Where it fails, the requests in it fail, and no others."""
        for model in self._models.values():
            owners = {row: one for one in self._running for row in one.pending(model)}
            if not owners:
                continue
            planned = model.plan(list(owners))
            try:
                model.run(planned)
            except Exception as error:  # as above
                for answering in dict.fromkeys(owners[row] for row, _ in planned):
                    self._leave(answering, _as_error(error))

    def _advance(self) -> None:
        for answering in [one for one in self._running if one.ready]:
            try:
                why: FinishReason | CollegiumError | None = answering.advance()
            except Exception as error:  # as above
                why = _as_error(error)
            if why:
                self._leave(answering, why)

    def _leave(self, answering: Answering, why: FinishReason | CollegiumError) -> None:
        with self._wake:
            self._running.remove(answering)
            self._stuck = False
        answering.leave()
        if isinstance(why, CollegiumError):
            answering.generation.put(why)
        else:
            answering.end(why)

    def _end(self) -> None:
        """Whatever ended the thread, nobody waits for it in vain."""
        with self._wake:
            self._closed = True
            left = [*self._running, *self._waiting]
        for answering in left:
            answering.generation.put(CollegiumError("The engine broke down.", hint="Open Collegium again."))
        for model in self._models.values():
            model.decoder.close()


def _as_error(error: Exception) -> CollegiumError:
    if isinstance(error, CollegiumError):
        return error
    log.error("a request failed in the engine", exc_info=error)
    return CollegiumError(f"The model failed: {type(error).__name__}: {error}")
