"""The engine's row that a server computes: one request a token, or one for several that were drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ...errors import CollegiumError, InvalidRequest, RemoteUnavailable
from ..engine.batch import Floats
from .background import spawn
from .capabilities import Capabilities
from .client import RemoteClient, understood
from .drafting import Drafter
from .failures import Spent
from .vocabulary import ID, Vocabulary
from .wire import COMPLETIONS, NATIVE, body, ended, named, places, prompt_tokens


@dataclass(frozen=True, slots=True)
class BlackBox:
    """A model behind a server, asked for distributions."""

    client: RemoteClient
    can: Capabilities
    vocabulary: Vocabulary

    async def after(self, tokens: Sequence[int], drafted: int, spent: Spent) -> list[Floats]:
        """What follows `tokens` without the last `drafted`, and then after each of these: `drafted + 1` log-probabilities.

        Raises InvalidRequest where the server refuses or the tokens cannot be sent as text, RemoteUnavailable where it fails.
        """
        path = NATIVE if self.can.native else COMPLETIONS
        exact = self.prompt(tokens)
        # The same text cut otherwise is as good where only what follows all of it is wanted.
        prompt = exact if exact is not None or drafted else self.prompt(tokens, self.vocabulary.nearly)
        if prompt is None:
            raise InvalidRequest(
                f"{self.client.url} takes text alone, and no text reads as the tokens so far.",
                hint="Take a server that takes token ids.",
            )
        reply = await self.client.post(
            path, body(self.can, prompt, self.vocabulary.end, whole_prompt=drafted > 0), spent
        )
        read = prompt_tokens(reply)
        if isinstance(exact, str) and read not in (None, len(tokens)):
            raise RemoteUnavailable(
                f"{self.client.url} reads {read} tokens where {len(tokens)} were meant.",
                hint="Take a server that takes token ids, or the mode text.",
            )
        told = places(reply)
        if ended(reply) and len(told) != (len(tokens) if drafted else 1):
            if drafted:  # it is not certain what the last place is
                return await self.after(tokens[:-drafted], 0, spent)
            told = [{f"{ID}{self.vocabulary.end}": 0.0}]  # all that it says is that the answer ends
        if len(told) <= drafted:
            raise InvalidRequest(f"{self.client.url} answers without log-probabilities.", hint="Take the mode text.")
        with understood(self.client.url):
            rows = [self.vocabulary.row(named(place)) for place in told[-drafted - 1 :]]
        return rows if self.can.whole else [_likeliest(row, self.can.top_k) for row in rows]

    def prompt(
        self, tokens: Sequence[int], text: Callable[[Sequence[int]], str | None] | None = None
    ) -> str | Sequence[int] | None:
        """How these tokens are sent, by `text` where the server takes no ids; None where they cannot be."""
        text = text or self.vocabulary.text
        if self.can.token_ids:
            return tokens
        if self.can.begins:  # the server writes it
            return text(tokens[1:]) if tokens[0] == self.vocabulary.begin else None
        return text(tokens)


def _likeliest(row: Floats, count: int) -> Floats:
    """`row` with -inf for all but the likeliest: of a token that was sent, or drawn, servers tell what is not among them too."""
    known = min(count, len(row))
    told: Floats = np.where(row < np.partition(row, -known)[-known], np.float32(-np.inf), row)
    return told


class BlackBoxRow:
    """`RemoteRow` of one answer. `error` is what went wrong, if something did."""

    def __init__(self, box: BlackBox, prompt: Sequence[int], spent: Spent, drafter: Drafter | None) -> None:
        self.error: CollegiumError | None = None
        self._box, self._prompt, self._spent = box, list(prompt), spent
        self._drafter = drafter if box.can.prompt_logprobs != "none" else None
        self._verified: dict[tuple[int, ...], Floats] = {}
        """What follows drafted tokens, by the answer up to them."""

    def logits(self, generated: Sequence[int]) -> Future[Floats]:
        """Log-probabilities `[vocab]`, -inf for what the server did not tell."""
        known = self._verified.pop(tuple(generated), None)
        if known is None:
            return spawn(self._ask(tuple(generated)))
        self._spent.accepted += 1
        future: Future[Floats] = Future()
        future.set_result(known)
        return future

    async def _ask(self, generated: tuple[int, ...]) -> Floats:
        try:
            draft = await self._draft(generated)
            rows = await self._box.after([*self._prompt, *generated, *draft], len(draft), self._spent)
        except CollegiumError as error:
            self.error = error
            raise
        self._verified = {(*generated, *draft[:count]): row for count, row in enumerate(rows) if count}
        return rows[0]

    async def _draft(self, generated: tuple[int, ...]) -> tuple[int, ...]:
        """A draft that can be sent; a token that begins a text, which some servers skip, ends it."""
        draft = await self._drafter.draft(generated) if self._drafter else ()
        begin = self._box.vocabulary.begin
        if begin in draft:
            draft = draft[: draft.index(begin)]
        while draft and self._box.prompt([*self._prompt, *generated, *draft]) is None:
            draft = draft[:-1]
        self._spent.drafted += len(draft)
        return draft
