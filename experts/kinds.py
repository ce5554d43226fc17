"""Kinds of expert: what a card's spec becomes when it answers.

A kind is a function from a card and its host to an `Expert`. A plug-in adds one through the entry point
`collegium.experts`; docs/extending.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

from ..errors import ArtifactCorrupt, InvalidRequest
from ..models.chat import ChatEncoder
from ..schema import Card, ExpertRequest, Lora, Message
from .artifacts import ArtifactStore
from .engine.engine import Engine
from .engine.generation import Generation
from .engine.request import Request, Row
from .engine.slots import Adapter


@dataclass(frozen=True, slots=True)
class Host:
    """What an expert may use: the engine of the base model, its chat encoder, the artifacts."""

    engine: Engine
    chat: ChatEncoder
    artifacts: ArtifactStore
    base: str
    max_prompt_tokens: int


class Expert(Protocol):
    """Somebody who answers."""

    @property
    def mode(self) -> str:
        """How it answers: `base`, `lora`, or a plug-in's word."""
        ...

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer; raises ContextTooLong where the last message alone does not fit."""


Kind = Callable[[Card, Host], Expert]


@dataclass(frozen=True, slots=True)
class LocalExpert:
    """The base model of this process, with an adapter or as it is."""

    host: Host
    system: str | None
    adapter: Adapter | None

    mode: str

    def row(self, request: ExpertRequest) -> Row:
        """The request as this expert reads it, under its own system prompt.

        The oldest turns are left out where the conversation is longer than the context; raises ContextTooLong where the last
        message alone does not fit.
        """
        messages = request.messages
        if self.system is not None and messages[0].role != "system":
            messages = (Message("system", self.system), *messages)
        room = min(self.host.max_prompt_tokens, self.host.engine.context_length - request.sampling.max_tokens)
        return Row(self.host.chat.encode_fitting(messages, room), self.adapter)

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer. Raises what `row` and the engine's `submit` raise."""
        row = self.row(request)
        return self.host.engine.submit(
            Request((row,), sampling=request.sampling, seed=request.seed, deadline=request.deadline)
        )


def _base(card: Card, host: Host) -> Expert:
    return LocalExpert(host, card.system, None, "base")


def _lora(card: Card, host: Host) -> Expert:
    assert isinstance(card.spec, Lora)
    folder = host.artifacts.verify(card.spec.adapter)  # every byte, once a process: a damaged adapter is never served
    adapter = Adapter(card.spec.adapter, folder, card.evidence.canary)
    host.engine.load(adapter)  # so that one that does not answer as it was measured degrades before it is asked
    return LocalExpert(host, card.system, adapter, "lora")


BUILT_IN: dict[str, Kind] = {"base": _base, "lora": _lora}


def open_expert(card: Card, host: Host) -> Expert:
    """The expert of a card. Raises ArtifactCorrupt or InvalidRequest where it cannot serve here."""
    if card.base != host.base:
        raise ArtifactCorrupt(
            f"{card.version} was measured on the base model {card.base}, this is {host.base}.",
            hint="Train it again on this base, or set base_model back.",
        )
    kind = BUILT_IN.get(card.spec.kind)
    if kind is None:
        plugins = {entry.name: entry for entry in entry_points(group="collegium.experts")}
        if card.spec.kind not in plugins:
            known = ", ".join(sorted({*BUILT_IN, *plugins}))
            raise InvalidRequest(f"{card.version} is of the unknown kind {card.spec.kind!r}.", hint=f"Known: {known}.")
        kind = plugins[card.spec.kind].load()
    return kind(card, host)
