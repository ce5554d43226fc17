"""The mode text: a server that tells no log-probabilities is helped with words.

The small expert writes what it knows of the question (BLADE, Xu/Li et al. 2024, "BLADE: Enhancing Black-box Large Language Models
with Small Domain-Specific Models"; PKG, Luo et al. 2023, "Augmented Large Language Models with Parametric Knowledge Guiding"),
and the nearest demonstrations come first as turns of the conversation.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ContextTooLong, RemoteUnavailable
from ...schema import Delta, ExpertRequest, FinishReason, Message, Sampling
from ..engine.request import Request
from ..proxy import Pair
from .client import RemoteClient, understood
from .demonstrations import Demonstrations
from .failures import Spent
from .listening import deltas
from .wire import CHAT

KNOWLEDGE = Sampling(max_tokens=96, repetition_penalty=1.1)
"""How the small expert writes what it knows."""
SHOWN = 4
"""Demonstrations beside a question."""
BACKGROUND = "Background by a small model that was trained on this field. It may be wrong: use what is right, leave out the rest."


@dataclass(frozen=True, slots=True)
class Helper:
    """What is put to a server with a conversation."""

    pair: Pair
    demonstrations: Demonstrations | None

    async def messages(self, request: ExpertRequest) -> list[dict[str, str]]:
        """The conversation with demonstrations and background. Raises what the engine raises."""
        head = [one for one in request.messages[:1] if one.role == "system"]
        rest = request.messages[len(head) :]
        if not head and self.pair.system is not None:
            head = [Message("system", self.pair.system)]
        shown = [
            Message(role, text) for row in self._shown(rest[-1].content) for role, text in zip(_ROLES, row, strict=True)
        ]
        last = Message("user", with_background(rest[-1].content, await self._knowledge(request)))
        return [{"role": one.role, "content": one.content} for one in (*head, *shown, *rest[:-1], last)]

    def _shown(self, question: str) -> list[tuple[str, str]]:
        """The nearest demonstrations, as many as fit the tokens that passages may take."""
        found = self.demonstrations.nearest(question, SHOWN) if self.demonstrations else []
        host = self.pair.host
        while found and sum(host.chat.count(text) for row in found for text in row) > host.settings.context_tokens:
            found = found[1:]
        return found

    async def _knowledge(self, request: ExpertRequest) -> str:
        """What the small expert writes on the last question; nothing where that is too long for it."""
        asked = replace(request, messages=request.messages[-1:], sampling=KNOWLEDGE)
        with contextlib.suppress(ContextTooLong):
            row = self.pair.rows(asked)["tuned"]
            generation = self.pair.host.engine.submit(Request((row,), sampling=KNOWLEDGE, deadline=request.deadline))
            async with contextlib.aclosing(deltas(generation)) as found:
                return "".join([delta.text async for delta in found]).strip()
        return ""


_ROLES: tuple[Any, Any] = ("user", "assistant")


def with_background(question: str, knowledge: str) -> str:
    """The question after what the small expert wrote, quoted line by line, so that it is not taken for the user's words."""
    if not knowledge:
        return question
    quoted = "\n".join(f"> {line}" for line in knowledge.splitlines())
    return f"{BACKGROUND}\n{quoted}\n\n{question}"


async def chat(
    client: RemoteClient, messages: Sequence[dict[str, str]], request: ExpertRequest, spent: Spent
) -> AsyncGenerator[Delta, None]:
    """The server's answer piece by piece, without tokens; the last one says why it ends. Raises what `stream` raises."""
    body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
    reason: FinishReason | None = None
    async with contextlib.aclosing(client.stream(CHAT, body | _options(request), spent)) as events:
        async for event in events:
            with understood(client.url):
                choice = (event.get("choices") or [{}])[0]
                text, why = (choice.get("delta") or {}).get("content"), choice.get("finish_reason")
            if text:
                yield Delta(str(text))
            if why:
                reason = "length" if why == "length" else "stop"
    if reason is None:
        raise RemoteUnavailable(f"{client.url} broke off.", hint="See whether the server runs.")
    yield Delta("", finish_reason=reason)


def _options(request: ExpertRequest) -> dict[str, Any]:
    """What OpenAI's API knows of how tokens are drawn; a repetition penalty is for small models, and not part of it."""
    sampling = request.sampling
    options: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    usual = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ()}
    options |= {name: getattr(sampling, name) for name, value in usual.items() if getattr(sampling, name) != value}
    return options | ({} if request.seed is None else {"seed": request.seed})
