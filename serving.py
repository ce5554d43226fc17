"""What serves: the models of this process, and one snapshot a release.

A request takes the snapshot that is live when it begins and keeps it, so a release that is published meanwhile changes
nothing under it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ArtifactCorrupt, CollegiumError, UnknownExpert
from .experts.home import Home
from .experts.kinds import Expert, Host, open_expert
from .retrieval import Index, fit_passages
from .router.policy import Scores, degraded, explicit, top1
from .router.router import Router
from .schema import Card, Context, Decision, Message, Release
from .settings import Settings

if TYPE_CHECKING:
    from .models.cache import CachedModel
    from .models.encoder import Encoder
    from .models.fetch import Progress
    from .router.head import Floats

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Loaded:
    """Artifacts in memory by content hash. They never change, so snapshots share them."""

    routers: dict[str, Router] = field(default_factory=dict)
    indexes: dict[str, Index] = field(default_factory=dict)
    experts: dict[str, Expert] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One release, ready to answer."""

    release: Release
    cards: dict[str, Card]
    router: Router
    home: Home
    host: Host
    loaded: Loaded
    settings: Settings

    def route(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        expert: str | None = None,
        domains: Collection[str] | None = None,
    ) -> list[tuple[Decision, Floats]]:
        """A decision for each conversation, with the embedding that it rests on."""
        if expert is not None and expert not in self.cards:
            self.home.registry.resolve(expert, self.release)  # raises UnknownExpert, unless it is a version
        scores = self._scores([_users(messages)[-1:] for messages in conversations], domains)
        # "And why?" says little by itself: where nothing fits, the turn before is read with it.
        unclear = [at for at, one in enumerate(scores) if not one.known and len(_users(conversations[at])) > 1]
        if unclear:
            again = self._scores([_users(conversations[at])[-2:] for at in unclear], domains)
            for at, one in zip(unclear, again, strict=True):
                scores[at] = one if one.known else scores[at]
        return [(self._decide(one, expert), one.embedding) for one in scores]

    def _scores(self, texts: Sequence[Sequence[str]], domains: Collection[str] | None) -> list[Scores]:
        return self.router.scores(["\n".join(parts) for parts in texts], domains=domains)

    def _decide(self, scores: Scores, expert: str | None) -> Decision:
        if expert is not None:
            return explicit(scores, expert)
        live = {card.domain: name for name, card in self.cards.items() if card.domain}
        return top1(scores, live, self.settings.fallback)

    def dispatch(self, decision: Decision) -> tuple[Decision, Card, Expert]:
        """The expert that a decision names; the fallback, with the reason, where it cannot serve."""
        try:
            return (decision, *self._open(decision.expert))
        except ArtifactCorrupt as error:
            if decision.expert == self.settings.fallback:
                raise
            log.error("expert %s cannot serve: %s", decision.expert, error)
            return (degraded(decision, self.settings.fallback), *self._open(self.settings.fallback))

    def _open(self, name: str) -> tuple[Card, Expert]:
        card = self.cards.get(name) or self.home.registry.resolve(name, self.release)
        if card.version not in self.loaded.experts:
            self.loaded.experts[card.version] = open_expert(card, self.host)
        return card, self.loaded.experts[card.version]

    def retrieve(self, card: Card, decision: Decision, embedding: Floats) -> Context:
        """The passages of the expert's domain that fit the prompt and the budget; none where there is no index."""
        domain = card.domain or decision.domain or ""
        version = self.release.indexes.get(domain)
        if version is None or not self.settings.passages:
            return Context()
        try:
            index = self._index(version)
        except ArtifactCorrupt as error:
            log.error("the index of %s cannot serve: %s", domain, error)
            return Context()
        # More than are wanted, because those that overlap a better one are dropped.
        found = index.search(embedding, 3 * self.settings.passages, self.settings.passage_score)
        return fit_passages(found, self.host.chat.count, self.settings.context_tokens, most=self.settings.passages)

    def _index(self, version: str) -> Index:
        if version not in self.loaded.indexes:
            index = Index.load(self.home.artifacts.verify(version), version)
            if index.encoder_id != self.router.artifact.encoder:
                raise ArtifactCorrupt(
                    f"The index {version[:12]} was made with the encoder {index.encoder_id}.",
                    hint="Add its documents again.",
                )
            self.loaded.indexes[version] = index
        return self.loaded.indexes[version]


class Serving:
    """The models of this process, and the snapshot of the live release."""

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self.settings = settings
        self._loaded = Loaded()
        self._lock = threading.Lock()
        with ExitStack() as opened:
            self.home = opened.enter_context(Home(settings))
            base = self.home.models.get(settings.base_model, progress)
            self._encoder = _encoder(self.home, progress)
            release = self.home.ensure_base(base.identity)
            if settings.fallback not in release.aliases:
                raise UnknownExpert(
                    f"The fallback {settings.fallback!r} is not an expert.",
                    hint=f"Known: {', '.join(release.aliases)}.",
                )
            self._host = _host(self.home, base)
            opened.callback(self._host.engine.close)
            self._snapshot = self._take(release)
            self._opened = opened.pop_all()

    def snapshot(self) -> Snapshot:
        """The live release, ready; where a new one cannot be read, the one before goes on serving."""
        release = self.home.release()
        if release.id != self._snapshot.release.id:
            with self._lock:
                if release.id != self._snapshot.release.id:
                    try:
                        self._snapshot = self._take(release)
                    except CollegiumError as error:
                        log.error(
                            "release %s cannot serve, %s goes on: %s", release.id, self._snapshot.release.id, error
                        )
        return self._snapshot

    def close(self) -> None:
        """Stop the engine, close the home."""
        self._opened.close()

    def _take(self, release: Release) -> Snapshot:
        if release.router not in self._loaded.routers:
            folder = self.home.artifacts.verify(release.router)
            self._loaded.routers[release.router] = Router.load(folder, self._encoder, release.router[:12])
        cards = self.home.cards(release)
        return Snapshot(
            release, cards, self._loaded.routers[release.router], self.home, self._host, self._loaded, self.settings
        )


def _users(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role == "user"]


def _encoder(home: Home, progress: Progress | None) -> Encoder:
    from .models.encoder import Encoder

    return Encoder(home.models.get(home.settings.encoder, progress))


def _host(home: Home, base: CachedModel) -> Host:
    from .experts.engine.load import open_engine
    from .models.chat import ChatEncoder
    from .models.load import load_tokenizer

    tokenizer = load_tokenizer(base)
    engine = open_engine(base, home.settings, tokenizer)
    return Host(engine, ChatEncoder(tokenizer), home.artifacts, base.identity, home.settings.max_prompt_tokens)
