"""The questions that a server is asked once, a token each, and what its answers say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ...errors import RemoteUnavailable, UnsupportedModel
from ..engine.batch import Floats
from .capabilities import Capabilities
from .client import Body, RemoteClient, understood
from .failures import Spent
from .vocabulary import ID, Vocabulary
from .wire import CHAT, COMPLETIONS, NATIVE, body, drawn, named, places, prompt_tokens

TEXT = "In 1847, Ångström's naïve café-goers counted:\n\n\tfor x in range(128): print('antidisestablishmentarianism') — the"
"""Digits, umlauts, white space and a long word: vocabularies differ in how they cut these."""
MOST_CALLS = 60
LADDER = (1000, 100, 20, 5, 1)
"""How many log-probabilities are asked for, until the server gives some."""
NEAR, TELLING, FAMILIAR = 0.2, -10.0, 0.9
"""Log-probabilities above TELLING that differ by less than NEAR on average are the same; of the tokens that a server of the
same vocabulary names, FAMILIAR or more are known here."""


class Probe:
    """One server, asked."""

    def __init__(self, client: RemoteClient, vocabulary: Vocabulary) -> None:
        self._client, self._vocabulary = client, vocabulary
        self._tokens = vocabulary.encode(TEXT)
        self._spent = Spent(MOST_CALLS)

    async def capabilities(self) -> Capabilities:
        """What the server can do.

        Raises UnsupportedModel where its tokens are not those of the models here, RemoteUnavailable where it fails.
        """
        with understood(self._client.url):
            return await self._found()

    async def _found(self) -> Capabilities:
        message = {"role": "user", "content": "Hello."}
        chat = await self._ask(CHAT, {"messages": [message], "max_tokens": 1}) is not None
        found = Capabilities(chat=chat)
        for native in (False, True):
            path = NATIVE if native else COMPLETIONS
            plain = {"prompt": "Hello", "n_predict" if native else "max_tokens": 1}
            if await self._ask(path, plain) is not None:
                found = await self._continuation(replace(found, completions=True, native=native))
                if found.top_k:
                    return found
        if not (found.chat or found.completions):
            raise RemoteUnavailable(
                f"{self._client.url} neither answers conversations nor goes on with texts for {self._client.model!r}.",
                hint="See whether the address and the model's name are those of the server.",
            )
        return replace(found, native=False)

    async def _continuation(self, found: Capabilities) -> Capabilities:
        found, reply = await self._top(found)
        if reply is None:
            return found
        found = await self._prompts(found, reply)
        found = replace(found, bias=await self._has_bias(found))
        return found if found.native else replace(found, prompt_logprobs=await self._prompt_logprobs(found))

    async def _top(self, found: Capabilities) -> tuple[Capabilities, Body | None]:
        """How many log-probabilities of a place come, and whether by id; with the reply that had them."""
        for count in (min(most, len(self._vocabulary)) for most in LADDER):
            for by_id in (not found.native, False):
                tried = replace(found, top_k=count, by_id=by_id)
                reply = await self._next(tried, TEXT)
                if reply is None or not places(reply):
                    continue
                names = [name for name, _ in named(places(reply)[-1])]
                # Servers give fewer than they are asked for without a word, and some ignore what they do not know.
                known = int(np.isfinite(self._row(reply)).sum())
                ids = all(isinstance(name, int) or name.startswith(ID) for name in names)
                whole = known >= len(self._vocabulary)
                return replace(tried, top_k=min(count, len(names)), by_id=ids and by_id, whole=whole), reply
        return found, None

    async def _prompts(self, found: Capabilities, by_text: Body) -> Capabilities:
        """How prompts may be sent. Raises UnsupportedModel where no way gives what the tokens here would mean."""
        count, tokens = prompt_tokens(by_text), self._tokens
        begins = count == len(tokens) + 1 and self._vocabulary.begin is not None
        if begins and self._vocabulary.begin is not None:
            tokens = [self._vocabulary.begin, *tokens]
        by_ids = await self._next(found, tokens)
        row = self._row(by_text)
        if by_ids is not None and places(by_ids) and _alike(row, self._row(by_ids)):
            return replace(found, token_ids=True, begins=begins)
        names = [name for name, _ in named(places(by_text)[-1])]
        if count == len(tokens) and self._vocabulary.share(names) >= FAMILIAR:
            return replace(found, begins=begins)
        raise UnsupportedModel(
            f"{self._client.model} at {self._client.url} does not read the tokens that the base model here does: a text of "
            f"{len(self._tokens)} is {count or 'an unknown number'} there.",
            hint="Take a model of the base model's family, or let them exchange words: --mode text.",
        )

    async def _has_bias(self, found: Capabilities) -> bool:
        """Whether a token that is forbidden keeps its log-probability, and is not drawn."""
        prompt: str | Sequence[int] = self._tokens if found.token_ids else TEXT
        free = await self._next(found, prompt)
        if free is None or not places(free):
            return False
        row = self._row(free)
        best = int(row.argmax())
        bound = await self._next(replace(found, bias=True), prompt, forbidden=best)
        if bound is None or not places(bound):
            return False
        return drawn(bound) != drawn(free) and _alike(row, self._row(bound))

    async def _prompt_logprobs(self, found: Capabilities) -> Literal["none", "field", "echo"]:
        """How the server tells what it expected after each token of the prompt, if what it tells is that."""
        shorter = self._tokens[:-1]
        if not found.token_ids and self._vocabulary.text(shorter) is None:
            return "none"
        expected = await self._next(found, shorter if found.token_ids else self._vocabulary.decode(shorter))
        if expected is None or not places(expected):
            return "none"
        ways: tuple[Literal["field", "echo"], ...] = ("field", "echo")
        for way in ways:
            tried = replace(found, prompt_logprobs=way)
            reply = await self._next(tried, self._tokens if found.token_ids else TEXT, whole_prompt=True)
            told = places(reply) if reply else []
            if len(told) > 1 and _alike(self._row(expected), self._vocabulary.row(named(told[-2]))):
                return way
        return "none"

    async def _next(
        self,
        found: Capabilities,
        prompt: str | Sequence[int],
        *,
        forbidden: int | None = None,
        whole_prompt: bool = False,
    ) -> Body | None:
        end = self._vocabulary.end if forbidden is None else forbidden
        path = NATIVE if found.native else COMPLETIONS
        return await self._ask(path, body(found, prompt, end, whole_prompt=whole_prompt))

    async def _ask(self, path: str, asked: Mapping[str, Any]) -> Body | None:
        return await self._client.ask(path, asked, self._spent)

    def _row(self, reply: Body) -> Floats:
        return self._vocabulary.row(named(places(reply)[-1]))


def _alike(one: Floats, other: Floats) -> bool:
    """Whether two rows say the same of what both know, which includes the likeliest token of each."""
    both = np.isfinite(one) & np.isfinite(other)
    if not (both[one.argmax()] and both[other.argmax()]):
        return False
    telling = both & (np.maximum(one, other) > TELLING)
    return float(np.abs(one[telling] - other[telling]).mean()) < NEAR
