"""One answer of a black box, from whoever gives it in the end to whoever asked. It lives on the background loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from ...errors import CollegiumError, InvalidRequest, Overloaded, RemoteUnavailable
from ...schema import Delta, ExpertRequest, FinishReason
from ..combination import Formula, Part, with_tail
from ..engine.generation import Generation
from ..engine.request import RemoteRow, Request, Row
from ..engine.text import TextStream
from ..proxy import Pair
from .capabilities import Capabilities
from .client import RemoteClient
from .drafting import Drafter
from .failures import Spent
from .listening import deltas
from .row import BlackBox, BlackBoxRow
from .text import Helper, chat
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, checked: the rows of the small pair, and the formula that the expert's combination makes of its alpha."""

    request: ExpertRequest
    rows: dict[Part, Row]
    formula: Formula


@dataclass(slots=True)
class RemoteAnswer:
    """`outer` is what the asker holds; `mode` how the answer is given so far, and `tokens` what it has so far."""

    asked: Asked
    outer: Generation
    client: RemoteClient
    pair: Pair
    helper: Helper
    vocabulary: Vocabulary
    spent: Spent
    mode: str
    tokens: list[int] = field(default_factory=list)
    _text: TextStream = field(init=False)

    def __post_init__(self) -> None:
        backend = self.vocabulary.tokenizer.backend_tokenizer
        stop = self.asked.request.sampling.stop
        self._text = TextStream(lambda ids: str(backend.decode(ids, skip_special_tokens=True)), stop)

    async def give(self, capabilities: Callable[[], Awaitable[Capabilities]] | None) -> None:
        """Answer, to the last delta; by what the server can do, None for words alone. Raises what ends it without one."""
        deadline = self.asked.request.deadline
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                can = await capabilities() if capabilities else None
                reason = await self._by_logprobs(can) if can and can.top_k else await self._by_text()
        except TimeoutError:
            reason = "cancelled"
        self.end(Delta(self._text.finish(), finish_reason=reason))

    def end(self, last: Delta | CollegiumError) -> None:
        """Hand over what comes last, once what the answer was and cost is final."""
        self.outer.mode, self.outer.paid = self.mode, self.spent.paid
        self.outer.put(last)

    async def _by_logprobs(self, can: Capabilities) -> FinishReason:
        self.mode = can.mode
        row = self._row(can)
        formula = self.asked.formula if can.whole else with_tail(self.asked.formula)
        rows: dict[Part, Row | RemoteRow] = {**self.asked.rows, "large": row}
        request = self.asked.request
        generation = self.pair.host.engine.submit(
            Request(
                tuple(rows[part] for part in formula.parts),
                formula.combiner,
                request.sampling,
                seed=request.seed,
                deadline=request.deadline,
            )
        )
        try:
            return await self._follow(generation)
        except CollegiumError as error:
            if error is not row.error:
                raise
            if self.tokens:
                return await self._go_on(error)
            if not isinstance(error, InvalidRequest):
                raise
            log.warning("%s gives no log-probabilities now, words are exchanged: %s", self.client.url, error)
            return await self._by_text()

    def _row(self, can: Capabilities) -> BlackBoxRow:
        host, tuned = self.pair.host, self.asked.rows["tuned"]
        most = host.settings.remote_draft
        drafter = Drafter(host.engine, tuned, self.asked.request.sampling, most) if most else None
        return BlackBoxRow(BlackBox(self.client, can, self.vocabulary), tuned.prompt, self.spent, drafter)

    async def _by_text(self) -> FinishReason:
        self.mode = "remote-text"
        request = self.asked.request
        messages = await self.helper.messages(request)
        try:
            async with aclosing(chat(self.client, messages, request, self.spent)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason:
                        return piece.finish_reason
                    self._hand_over(replace(piece, token_ids=tuple(self.pair.model.chat.text(piece.text))))
        except InvalidRequest as error:  # whoever asked is not to blame
            raise RemoteUnavailable(error.message, hint=error.hint) from None
        except RemoteUnavailable as error:
            if self.tokens:
                return await self._go_on(error)
            raise
        raise AssertionError  # a chat ends with a reason, or raises

    async def _go_on(self, error: CollegiumError) -> FinishReason:
        """The server has failed in mid-answer: the small expert goes on, or the answer ends as it is."""
        log.warning("an answer of %s breaks off after %d tokens: %s", self.client.url, len(self.tokens), error)
        request, tuned = self.asked.request, self.asked.rows["tuned"]
        left = request.sampling.max_tokens - len(self.tokens)
        sampling = replace(request.sampling, max_tokens=left, stop=(), min_tokens=0)
        if left > 0 and self.pair.host.settings.remote_failure == "expert":
            row = replace(tuned, prompt=[*tuned.prompt, *self.tokens])
            asked = Request((row,), sampling=sampling, seed=request.seed, deadline=request.deadline)
            try:
                generation = self.pair.host.engine.submit(asked)
            except Overloaded:
                log.warning("nor has the small expert room to go on")
            else:
                self.mode += "+expert"
                return await self._follow(generation)
        self.mode += "+partial"
        return "length"

    async def _follow(self, generation: Generation) -> FinishReason:
        """Hand over the tokens of a running answer. The text is made here, so that it goes on where somebody else does."""
        async with aclosing(deltas(generation)) as drawn:
            async for delta in drawn:
                if delta.finish_reason:
                    return delta.finish_reason
                self._hand_over(replace(delta, text="".join(map(self._text.push, delta.token_ids))))
                if self._text.stopped:
                    return "stop"
        raise AssertionError  # a generation ends with a reason, or raises

    def _hand_over(self, delta: Delta) -> None:
        self.tokens += delta.token_ids
        self.outer.put(delta)
