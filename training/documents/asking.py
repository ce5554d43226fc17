"""Who is asked to write training rows: a model of this process as it is served, or one behind a server."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field

from ...errors import InvalidRequest
from ...experts.engine.request import BASE, Row
from ...experts.kinds import Host
from ...experts.remote.background import spawn
from ...experts.remote.client import RemoteClient
from ...experts.remote.failures import Spent
from ...experts.remote.text import chat
from ...schema import ExpertRequest, Message, Sampling
from ..measuring.answerer import EngineAnswerer

Ask = Callable[[Sequence[str], int], Iterator[str]]
"""From questions, and the longest answer in tokens, to the answers in the order of the questions.

What cannot be asked, since it does not fit the model, is answered with an empty text.
"""

AT_ONCE = 8
"""Conversations with a server at once."""


@dataclass(frozen=True, slots=True)
class AskModel:
    """A model of the host's engine by its name in the pool, many questions at once and greedily: the same answers every time.

    Raises what opening the model raises.
    """

    host: Host
    model: str = BASE

    def __call__(self, questions: Sequence[str], max_tokens: int) -> Iterator[str]:
        """Raises what `run_all` raises."""
        opened = self.host.models.open(self.model)
        room = min(self.host.settings.max_prompt_tokens, self.host.engine.room(opened.name) - max_tokens)
        encoded = [opened.chat.encode([Message("user", text)]) for text in questions]
        fits = [len(prompt) <= room for prompt in encoded]
        answerer = EngineAnswerer(self.host.engine, lambda prompt: (Row(prompt, None, opened.name),))
        asked = [prompt for prompt, fit in zip(encoded, fits, strict=True) if fit]
        answers = answerer.generate(asked, max_tokens)
        for fit in fits:
            yield opened.chat.decode(next(answers)) if fit else ""


@dataclass(frozen=True, slots=True)
class AskServer:
    """A model behind an OpenAI-compatible server, at a host that the settings allow. `spent` counts what that cost."""

    client: RemoteClient
    spent: Spent = field(default_factory=lambda: Spent(sys.maxsize))

    def __call__(self, questions: Sequence[str], max_tokens: int) -> Iterator[str]:
        """A few at once. Raises RemoteUnavailable where the server fails, InvalidRequest where it refuses the first question.

        One that it refuses later (for its content or its length) is answered with an empty text.
        """
        running: deque[Future[str]] = deque()
        waiting = iter(questions)
        answered = False
        try:
            while True:
                while len(running) < AT_ONCE and (text := next(waiting, None)) is not None:
                    running.append(spawn(say(self.client, text, max_tokens, self.spent)))
                if not running:
                    return
                try:
                    said = running.popleft().result().strip()
                except InvalidRequest:
                    if not answered:
                        raise
                    said = ""
                answered = True
                yield said
        finally:
            for future in running:
                future.cancel()


async def say(client: RemoteClient, text: str, max_tokens: int, spent: Spent) -> str:
    """What a server's model answers, without any help. Raises what the client raises."""
    request = ExpertRequest((Message("user", text),), "", sampling=Sampling(max_tokens=max_tokens))
    messages = [{"role": "user", "content": text}]
    async with aclosing(chat(client, messages, request, spent)) as pieces:
        return "".join([piece.text async for piece in pieces])
