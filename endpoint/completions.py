"""An answer over HTTP: whole, or piece by piece as server-sent events. A client that goes away stops it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import CollegiumError, ModelUnavailable
from ..runtime import Answer, Collegium
from ..schema import Delta
from .errors import error_to_dict
from .incoming import ChatRequest
from .wire import DONE, Completion, chunk, completion, decision_to_dict, event, reply_to_dict, usage_chunk

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Server-sent events. However they end, the answer stops with them."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def complete(body: ChatRequest, request: Request, collegium: Collegium) -> Completion | EventStream:
    """Answer a request. What goes wrong before the first piece is raised; later it is an event of the stream."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    head = {"id": name, "created": int(time.time())}
    answer = await collegium.astream(
        body.prompt,
        expert=body.expert,
        domains=body.options.domains,
        retrieve=body.options.retrieve,
        alpha=body.options.alpha,
        sampling=body.sampling(collegium.settings),
        seed=body.seed,
        request_id=name,
    )
    deltas = aiter(answer)
    async with _stopped_with_client(request, answer):
        first = await anext(deltas)
        if first.finish_reason:
            _check_finished(answer)
        if body.stream:
            return EventStream(answer, _events(body, head, answer, first, deltas))
        async for _ in deltas:
            pass
    _check_finished(answer)
    return completion(head, answer.reply)


@asynccontextmanager
async def _stopped_with_client(request: Request, answer: Answer) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def _events(
    body: ChatRequest, head: dict[str, Any], answer: Answer, first: Delta, rest: AsyncIterator[Delta]
) -> AsyncIterator[str]:
    head = {**head, "model": answer.expert_version}
    decision = decision_to_dict(answer.decision)
    yield chunk(head, {"role": "assistant", "content": first.text}, collegium={"decision": decision})
    try:
        async for delta in rest:
            if delta.text:
                yield chunk(head, {"content": delta.text})
        _check_finished(answer)
    except Exception as error:  # the service's edge; the status has been sent, so the stream itself says it
        log.error("an answer broke off: %s", error, exc_info=not isinstance(error, CollegiumError))
        yield event(error_to_dict(error))
        return
    reply = answer.reply
    last = {name: value for name, value in reply_to_dict(reply).items() if name != "decision"}
    yield chunk(head, {}, reply.finish_reason, collegium=last)
    if body.include_usage:
        yield usage_chunk(head, reply)
    yield DONE


def _check_finished(answer: Answer) -> None:
    """Raise ModelUnavailable where the answer was cut off, which happens when the server stops."""
    if answer.reply.finish_reason not in ("stop", "length"):
        raise ModelUnavailable("The server is stopping, the answer is not whole.", hint="Try again in a while.")
