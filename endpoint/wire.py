"""What goes out, over HTTP in OpenAI's shapes and as JSON from the command line."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from ..schema import Card, Decision, Passage, Reply

AUTO = "auto"
"""The model that leaves the choice of the expert to the router."""

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


class DecisionBody(BaseModel):
    """A `Decision`; its numbers are rounded to 4 digits."""

    domain: str | None
    expert: str
    candidates: list[tuple[str, float]]
    probabilities: dict[str, float]
    prediction_set: list[str]
    confidence: float
    reason: str
    threshold: float
    router_version: str


class PassageBody(BaseModel):
    """A `Passage`; `span` is in characters of the document's text."""

    text: str
    document: str
    span: tuple[int, int]
    page: int | None
    score: float
    index_version: str


class PaidBody(BaseModel):
    """A `Paid`: what the answer cost at a remote server."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    drafted: int
    accepted: int


class ReplyBody(BaseModel):
    """What a reply carries beyond OpenAI's fields; `timings` are in seconds, `paid` is there where a remote server was asked."""

    decision: DecisionBody
    citations: list[PassageBody]
    expert_version: str
    mode: str
    timings: dict[str, float]
    paid: PaidBody | None = None


class AnswerBody(BaseModel):
    """The message that answers."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """OpenAI's choice; there is always one."""

    index: int = 0
    message: AnswerBody
    logprobs: None = None
    finish_reason: str


class UsageBody(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """OpenAI's chat completion; `model` is the version that answered."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody
    collegium: ReplyBody


class RouteReply(BaseModel):
    """One decision an input, in order."""

    decisions: list[DecisionBody]


class ModelDetails(BaseModel):
    """What is known about an expert; `auto` has no domain and no version."""

    domain: str | None = None
    version: str | None = None
    description: str


class ModelBody(BaseModel):
    """OpenAI's model object."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "collegium"
    collegium: ModelDetails


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class Status(BaseModel):
    """How the server is."""

    status: Literal["alive", "ready"]


def decision_to_dict(decision: Decision) -> dict[str, Any]:
    """The fields of `DecisionBody`."""
    rounded = {
        "probabilities": {name: round(p, 4) for name, p in decision.probabilities.items()},
        "confidence": round(decision.confidence, 4),
        "threshold": round(decision.threshold, 4),
    }
    return dataclasses.asdict(decision) | {"expert": decision.expert} | rounded


def passage_to_dict(passage: Passage) -> dict[str, Any]:
    """The fields of `PassageBody`."""
    return dataclasses.asdict(passage) | {"score": round(passage.score, 4)}


def reply_to_dict(reply: Reply) -> dict[str, Any]:
    """The fields of `ReplyBody`."""
    return {
        "decision": decision_to_dict(reply.decision),
        "citations": [passage_to_dict(passage) for passage in reply.citations],
        "expert_version": reply.expert_version,
        "mode": reply.mode,
        "timings": {name: round(seconds, 4) for name, seconds in reply.timings.items()},
        "paid": dataclasses.asdict(reply.paid) if reply.paid else None,
    }


def usage_to_dict(reply: Reply) -> dict[str, int]:
    """The fields of `UsageBody`."""
    usage = dataclasses.asdict(reply.usage)
    return usage | {"total_tokens": sum(usage.values())}


def completion(head: dict[str, Any], reply: Reply) -> Completion:
    """A whole answer; `head` holds its id and when it was created."""
    return Completion(
        **head,
        model=reply.expert_version,
        choices=[Choice(message=AnswerBody(content=reply.text), finish_reason=reply.finish_reason)],
        usage=UsageBody(**usage_to_dict(reply)),
        collegium=ReplyBody(**reply_to_dict(reply)),
    )


def event(body: dict[str, Any]) -> str:
    """A server-sent event. It is ASCII, because some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(body)}\n\n"


def chunk(head: dict[str, Any], delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
    """The event of one piece of an answer; `head` holds id, created and model."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})


def usage_chunk(head: dict[str, Any], reply: Reply) -> str:
    """The event that counts tokens."""
    return event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_to_dict(reply)})


def model_body(name: str, card: Card) -> ModelBody:
    """An expert in the list of models."""
    evidence = card.evidence
    details = ModelDetails(domain=card.domain or None, version=card.version, description=evidence.description)
    return ModelBody(id=name, created=_seconds(evidence.created), collegium=details)


def auto_body() -> ModelBody:
    """The router in the list of models."""
    return ModelBody(id=AUTO, collegium=ModelDetails(description="The router chooses the expert for each prompt."))


def _seconds(created: str) -> int:
    """Unix time of an ISO date; 0 where a card has none."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
