"""What serves: the models of this process, and one snapshot a release.

A request takes the snapshot that is live when it begins and keeps it, so a release that is published meanwhile changes
nothing under it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING

from .errors import ArtifactCorrupt, CollegiumError, InvalidRequest, ModelUnavailable, NoSpace, UnknownExpert
from .experts.decisions import DecisionLog, Logged
from .experts.home import Home
from .experts.kinds import Expert, Host, open_expert, open_host
from .experts.mixture import mixture
from .retrieval import Index, fit_passages
from .router.encoder import Encoders
from .router.policies.explicit import explicit
from .router.policies.sticky import sticky
from .router.policy import Live, Offer, Scores, degraded, policy
from .router.router import Router
from .router.words import users_words
from .schema import Card, Context, Decision, Message, Release
from .settings import Settings

if TYPE_CHECKING:
    from .models.cache import CachedModel
    from .models.encoder import Encoder
    from .models.fetch import Progress

log = logging.getLogger(__name__)
Candidates = tuple[tuple[str, float], ...]

TURNS = 32
"""Turns of the user that a conversation's domain is read from; their embeddings are remembered."""
RATES = frozenset({"accuracy", "exact_match", "macro_f1", "token_f1"})
"""Metrics from 0 to 1 of which more is better."""
COSTS = {"base": 1.0, "lora": 1.2, "proxy": 1.7}
CANNOT_SERVE = (ArtifactCorrupt, InvalidRequest, ModelUnavailable, NoSpace)
"""What opening an expert raises where it cannot serve here, for which nobody who asks is to blame. A full queue soon has room."""
DEAR = 3.0
"""What a token costs beside one of the base model, roughly: `benchmarks/engine.py` has base8 beside mixed8, `benchmarks/proxy.py`
a proxied expert; a plug-in may run several models."""


@dataclass(slots=True)
class Loaded:
    """Artifacts in memory by content hash. They never change, so snapshots share them.

    `encoder` opens the encoder of retrieval when the first index is searched; the router has one of its own.
    """

    encoder: Callable[[], Encoder]
    routers: dict[str, Router] = field(default_factory=dict)
    indexes: dict[str, Index] = field(default_factory=dict)
    experts: dict[str, Expert] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Routed:
    """A decision, the scores that it rests on, the user's words that were scored, and those to look something up for."""

    decision: Decision
    scores: Scores
    text: str
    query: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One release, ready to answer."""

    release: Release
    cards: dict[str, Card]
    router: Router
    live: Live
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
    ) -> list[Routed]:
        """A decision for each conversation. It follows from the conversation alone, so nothing is remembered between requests."""
        if expert is not None and expert not in self.cards:
            self.home.registry.resolve(expert, self.release)  # raises UnknownExpert, unless it is a version
        turns = [_turns(messages, TURNS if self.settings.sticky and not expert else 1) for messages in conversations]
        scores = iter(self.router.scores([text for each in turns for text in each], domains=domains))
        return [self._decide(each, [next(scores) for _ in each], expert) for each in turns]

    def _decide(self, turns: Sequence[str], scores: Sequence[Scores], expert: str | None) -> Routed:
        if expert is not None:
            return Routed(explicit(scores[-1], expert), scores[-1], turns[-1], turns[-1])
        decide = policy(self.settings.policy)
        decision: Decision | None = None
        for one in scores:
            decision = sticky(decide, one, self.live, decision)
        assert decision is not None  # every conversation has a turn
        # "And why?" says little by itself: what is looked up for it is looked up with the turn before.
        query = "\n".join(turns[-2:] if decision.reason == "sticky" else turns[-1:])
        return Routed(decision, scores[-1], turns[-1], query)

    def dispatch(self, decision: Decision) -> tuple[Decision, Card, Expert]:
        """The expert that a decision names, or several as one; the fallback, with the reason, where it cannot serve."""
        try:
            first = self._open(decision.expert)
        except CANNOT_SERVE as error:
            if decision.expert == self.settings.fallback:
                raise
            log.error("expert %s cannot serve: %s", decision.expert, error)
            return (degraded(decision, self.settings.fallback), *self._open(self.settings.fallback))
        if len(decision.candidates) == 1:
            return (decision, *first)
        together = self._mix(first[1], decision.candidates)
        if together is None:
            return (replace(decision, candidates=((decision.expert, 1.0),)), *first)
        return replace(decision, candidates=together[0]), first[0], together[1]

    def _mix(self, first: Expert, candidates: Candidates) -> tuple[Candidates, Expert] | None:
        """Those of the candidates that can serve, as one expert with the weights that they have then; None where none can."""
        (name, weight), *others = candidates
        able = [(name, first, weight)]
        for other, share in others[: min(self.settings.max_rows, self.settings.adapter_slots) - 1]:
            try:
                able.append((other, self._open(other)[1], share))
            except CANNOT_SERVE as error:
                log.error("expert %s cannot serve: %s", other, error)
        total = sum(share for _, _, share in able)
        try:
            mixed = mixture([(expert, share / total) for _, expert, share in able], self.host)
        except InvalidRequest as error:
            log.warning("%s answers alone: %s", name, error)
            return None
        return (tuple((one, share / total) for one, _, share in able), mixed) if len(able) > 1 else None

    def _open(self, name: str) -> tuple[Card, Expert]:
        card = self.cards.get(name) or self.home.registry.resolve(name, self.release)
        if card.version not in self.loaded.experts:
            self.loaded.experts[card.version] = open_expert(card, self.host)
        return card, self.loaded.experts[card.version]

    def retrieve(self, card: Card, routed: Routed) -> Context:
        """The passages of the expert's domain that fit the prompt and the budget; none where there is no index."""
        domain = card.domain or routed.decision.domain or ""
        version = self.release.indexes.get(domain)
        if version is None or not self.settings.passages:
            return Context()
        try:
            index = self._index(version)
        except ArtifactCorrupt as error:
            log.error("the index of %s cannot serve: %s", domain, error)
            return Context()
        # More than are wanted, because those that overlap a better one are dropped.
        query = self.loaded.encoder().encode([routed.query])[0]
        found = index.search(query, 3 * self.settings.passages, self.settings.passage_score)
        return fit_passages(found, self.host.chat.count, self.settings.context_tokens, most=self.settings.passages)

    def _index(self, version: str) -> Index:
        if version not in self.loaded.indexes:
            index = Index.load(self.home.artifacts.verify(version), version)
            if index.encoder_id != self.loaded.encoder().identity:
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
        self._lock = threading.Lock()
        policy(settings.policy)  # raises where there is none of this name
        with ExitStack() as opened:
            self.home = opened.enter_context(Home(settings))
            base = self.home.models.get(settings.base_model, progress)
            encoder = self.home.models.get(settings.encoder, progress)
            self._loaded = Loaded(cache(lambda: _encoder(encoder)))
            self._encoders = Encoders(
                encoder, precision=settings.encoder_precision, threads=settings.threads, device=settings.device
            )
            release = self.home.ensure_base(base.identity)
            self._host = open_host(self.home, base)
            opened.callback(self._host.engine.close)
            self._log = None
            if settings.log_decisions:
                self._log = DecisionLog(self.home.registry, keep_text=settings.log_prompts, days=settings.log_days)
                opened.callback(self._log.close)
            if progress:
                progress("preparing the router", 0, 0)  # the first time, its encoder is exported to int8
            self._snapshot = self._take(release)
            self._opened = opened.pop_all()

    def note(self, snapshot: Snapshot, routed: Routed, domains: Collection[str] | None) -> None:
        """Log a decision, where settings say so; never waits."""
        if self._log:
            artifact = snapshot.router.artifact
            self._log.put(
                Logged(
                    routed.decision,
                    routed.scores.embedding,
                    artifact.encoder,
                    snapshot.release.id,
                    routed.text,
                    domains=tuple(domains) if domains is not None else None,
                )
            )

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
        cards = self.home.cards(release)
        if self.settings.fallback not in cards:
            raise UnknownExpert(
                f"The fallback {self.settings.fallback!r} is not an expert.", hint=f"Known: {', '.join(cards)}."
            )
        if release.router not in self._loaded.routers:
            folder = self.home.artifacts.verify(release.router)
            # Snapshots that still answer hold theirs.
            self._loaded.routers = {release.router: Router.load(folder, self._encoders, release.router[:12])}
        return Snapshot(
            release,
            cards,
            self._loaded.routers[release.router],
            _live(cards, self.settings.fallback),
            self.home,
            self._host,
            self._loaded,
            self.settings,
        )


def _turns(messages: Sequence[Message], most: int) -> list[str]:
    """The user's own words of the last turns, oldest first."""
    return [users_words(message.content) for message in messages if message.role == "user"][-most:]


def _live(cards: Mapping[str, Card], fallback: str) -> Live:
    """What policies choose from, with the rates that were measured: accuracy and its like, 1 at best."""
    rates = {card.domain: [score for score in card.evidence.scores if score.metric in RATES] for card in cards.values()}
    return Live(
        offers={
            card.domain: Offer(
                name,
                fmean(score.value for score in rates[card.domain]) if rates[card.domain] else None,
                COSTS.get(card.spec.kind, DEAR),
            )
            for name, card in cards.items()
            if card.domain
        },
        fallback=Offer(fallback, None, COSTS.get(cards[fallback].spec.kind, DEAR)),
        baseline={domain: fmean(score.base for score in scores) for domain, scores in rates.items() if scores},
    )


def _encoder(model: CachedModel) -> Encoder:
    from .models.encoder import Encoder

    return Encoder(model)
