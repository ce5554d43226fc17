"""One request in the engine, from its first row to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ...schema import Delta, FinishReason
from .batch import Floats
from .combine import log_sum_exp
from .generation import Generation
from .model import Model, Running
from .request import RemoteRow, Request, Row
from .sampling import Sampler, Token
from .text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Awaited:
    """A row that somebody else computes: a future for each token."""

    def __init__(self, row: RemoteRow, notify: Callable[[], None]) -> None:
        self._row, self._done = row, lambda _: notify()
        self._generated: list[int] = []
        self._future = self._ask()

    @property
    def ready(self) -> bool:
        """Whether the logits have come, or an error."""
        return self._future.done()

    @property
    def logits(self) -> Floats:
        """`[vocab]`, once ready. Raises what the other side raised."""
        return self._future.result()

    def append(self, token: int) -> None:
        """Go on with a drawn token."""
        self._generated.append(token)
        self._future = self._ask()

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._future.cancel()

    def _ask(self) -> Future[Floats]:
        future = self._row.logits(tuple(self._generated))
        future.add_done_callback(self._done)
        return future


class Forced:
    """In place of a sampler: gives the tokens of an answer that is there already, with their log-probabilities."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def draw(self, logits: Floats) -> Token:
        """The next token of the answer."""
        token = next(self._tokens)
        return Token(token, float(logits[token]) - log_sum_exp(logits), None)


class Answering:
    """A request with its rows. Raises InvalidRequest where its sampling is out of range."""

    def __init__(
        self, request: Request, generation: Generation, tokenizer: PreTrainedTokenizerFast, notify: Callable[[], None]
    ) -> None:
        self.request, self.generation = request, generation
        self._notify = notify
        self._rows: list[Running | Awaited] = []
        self._local: list[Running] = []  # those of them that are computed here
        sampling, forced, end = request.sampling, request.forced, int(tokenizer.eos_token_id)
        self._source: Sampler | Forced = (
            Forced(forced) if forced else Sampler(sampling, request.local[0].prompt, end, request.seed, request.masks)
        )
        self._end = None if forced else end  # what is scored is scored to its last token
        backend = tokenizer.backend_tokenizer
        self._text = TextStream(
            lambda ids: str(backend.decode(ids, skip_special_tokens=True)), () if forced else sampling.stop
        )
        self._generated: list[int] = []

    @property
    def over(self) -> bool:
        """Whether nobody wants it any more."""
        deadline = self.request.deadline
        return self.generation.cancelled.is_set() or (deadline is not None and time.monotonic() > deadline)

    @property
    def active(self) -> bool:
        """Whether there is something to do for it: a row to compute, or a token to draw."""
        return any(row.pending for row in self._local) or self.ready

    @property
    def ready(self) -> bool:
        """Whether the logits of all rows are there."""
        return all(row.ready for row in self._rows)

    def pending(self, model: Model) -> list[Running]:
        """The rows on `model` that wait for a pass."""
        return [row for row in self._local if row.model is model and row.pending]

    def start(self, models: Mapping[str, Model]) -> bool:
        """Take in all rows, or none and return False. Raises what reading an adapter or asking for a remote row raises."""
        try:
            if self._start_local(models):
                self._ask_remote()
                return True
        except BaseException:
            self.leave()
            raise
        self.leave()
        return False

    def advance(self) -> FinishReason | None:
        """Draw a token and hand it over; why the answer ends, if it does."""
        # Models of one family pad their vocabularies to different sizes; no token lies in what is cut off here.
        width = min(row.model.decoder.shape.vocab for row in self._local)
        logits = self.request.combiner([row.logits[:width] for row in self._rows], self._generated)
        token = self._source.draw(logits)
        if token.id == self._end:
            return "stop"
        logprobs = None if token.logprob is None else (token.logprob,)
        tops = None if token.top is None else (token.top,)
        self.generation.put(Delta(self._text.push(token.id), (token.id,), logprobs, top_logprobs=tops))
        self._generated.append(token.id)
        if self._text.stopped:
            return "stop"
        if len(self._generated) == self.request.new_tokens:
            return "length"
        for row in self._rows:
            row.append(token.id)
        return None

    def leave(self) -> None:
        """Give back what the rows hold."""
        rows, self._rows, self._local = self._rows, [], []
        for row in rows:
            row.leave()

    def end(self, reason: FinishReason) -> None:
        """Hand over what is left of the text, and why it ends."""
        self.generation.put(Delta(self._text.finish(), finish_reason=reason))

    def _start_local(self, models: Mapping[str, Model]) -> bool:
        for row in self.request.local:
            running = models[row.model].start(row, len(row.prompt) + self.request.new_tokens)
            if running is None:
                return False
            self._local.append(running)
            self._rows.append(running)
        return True

    def _ask_remote(self) -> None:
        """Once it is certain that all others have room: what is asked for cannot be asked back."""
        for place, row in enumerate(self.request.rows):
            if not isinstance(row, Row):
                self._rows.insert(place, Awaited(row, self._notify))
