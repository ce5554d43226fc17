"""Kinds of expert: what a card's spec becomes when it answers.

A kind is a function from a card and its host to an `Expert`. A plug-in adds one through the entry point
`collegium.experts`; docs/extending.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..errors import ArtifactCorrupt
from ..models.cache import CachedModel
from ..models.chat import ChatEncoder
from ..plugins import find
from ..schema import Card, ExpertRequest, Lora, Message
from ..settings import Settings
from .artifacts import ArtifactStore
from .engine.engine import Engine
from .engine.generation import Generation
from .engine.request import BASE, Request, Row
from .engine.slots import Adapter
from .home import Home
from .pool import ModelPool


@dataclass(frozen=True, slots=True)
class Host:
    """What an expert may use: the engine, the base model's chat encoder and identity, further models, the artifacts, settings."""

    engine: Engine
    chat: ChatEncoder
    artifacts: ArtifactStore
    base: str
    models: ModelPool
    settings: Settings


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
        """The request as this expert reads it. Raises ContextTooLong where the last message alone does not fit."""
        room = self.host.engine.room()
        return Row(prompt_tokens(request, self.system, self.host, self.host.chat, room), self.adapter)

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer. Raises what `row` and the engine's `submit` raise."""
        row = self.row(request)
        return self.host.engine.submit(
            Request((row,), sampling=request.sampling, seed=request.seed, deadline=request.deadline)
        )


def prompt_tokens(request: ExpertRequest, system: str | None, host: Host, chat: ChatEncoder, room: int) -> list[int]:
    """The conversation as `chat` encodes it, under the expert's own system prompt; it fits `room` tokens with the answer.

    The oldest turns are left out where it is longer; raises ContextTooLong where the last message alone does not fit.
    """
    messages = request.messages
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return chat.encode_fitting(messages, min(host.settings.max_prompt_tokens, room - request.sampling.max_tokens))


def open_host(home: Home, base: CachedModel) -> Host:
    """An engine on the base model, and what else experts use. Whoever opens it closes the engine. Raises what loading raises."""
    from ..models.load import load_tokenizer
    from .engine.load import open_engine

    settings, tokenizer = home.settings, load_tokenizer(base)
    engine = open_engine(base, settings, tokenizer)
    models = ModelPool(engine, base, tokenizer, home.models, home.artifacts, settings)
    return Host(engine, ChatEncoder(tokenizer), home.artifacts, base.identity, models, settings)


@contextmanager
def closing_host(home: Home, base: CachedModel) -> Iterator[Host]:
    """An engine as the home's settings have it, closed at the end. Raises what `open_host` raises."""
    host = open_host(home, base)
    try:
        yield host
    finally:
        host.engine.close()


def open_base(card: Card, host: Host) -> Expert:
    """The base model."""
    return LocalExpert(host, card.system, None, "base")


def open_lora(card: Card, host: Host) -> Expert:
    """The base model with an adapter."""
    assert isinstance(card.spec, Lora)
    return LocalExpert(host, card.system, load_adapter(card.spec.adapter, card, host), "lora")


def load_adapter(version: str, card: Card, host: Host, model: str = BASE) -> Adapter:
    """The adapter of a card, in the engine. Raises ArtifactCorrupt where it is damaged or does not answer as it was measured."""
    folder = host.artifacts.verify(version)  # every byte, once a process: a damaged adapter is never served
    adapter = Adapter(version, folder, card.evidence.canary)
    host.engine.load(adapter, model)  # so that one that does not do what it did degrades before it is asked
    return adapter


BUILT_IN = {
    "base": "experts.kinds:open_base",
    "lora": "experts.kinds:open_lora",
    "proxy": "experts.proxy:open_proxy",
    "remote": "experts.remote.expert:open_remote",
}


def open_expert(card: Card, host: Host) -> Expert:
    """The expert of a card. Raises ArtifactCorrupt or InvalidRequest where it cannot serve here."""
    if card.base != host.base:
        raise ArtifactCorrupt(
            f"{card.version} was measured on the base model {card.base}, this is {host.base}.",
            hint="Train it again on this base, or set base_model back.",
        )
    unknown = f"{card.version} is of the unknown kind {card.spec.kind!r}."
    kind: Kind = find("collegium.experts", card.spec.kind, BUILT_IN, unknown)
    return kind(card, host)
