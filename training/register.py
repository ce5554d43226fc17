"""Make a domain live: its index, its router class and its expert, as one release."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from ..errors import InvalidRequest, NameTaken, UnknownExpert
from ..experts.adapters import store_adapter
from ..experts.home import Home
from ..experts.probe import make_canary
from ..models.cache import CachedModel
from ..router.artifact import RouterArtifact
from ..schema import Base, Canary, Card, Evidence, Lora, Release, Spec
from .domain import Learned, NewDomain, learn, store_router
from .recipes import Progress

RESERVED = frozenset({"auto", "base", "none"})
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Pairing:
    """The small model that an adapter is held against and probed on, and the spec that is made of the adapter in the store."""

    model: CachedModel
    spec: Callable[[Lora], Spec]


def register(
    home: Home,
    domain: NewDomain | None,
    *,
    name: str | None = None,
    adapter: Path | None = None,
    pairing: Pairing | None = None,
    evidence: Evidence | None = None,
    system: str | None = None,
    progress: Progress,
    notes: Callable[[str], None] = lambda note: None,
) -> Card:
    """Publish a release in which `name` (the domain's by default) answers for the domain; returns its card.

    A domain that the router knows keeps its class. An expert without a domain needs an adapter; it is asked for by name, and the
    router stays as it is. Without a `pairing`, the adapter is one of the base model. `system` is the new expert's system prompt.
    `notes` is told, a sentence each, what was not read. Raises InvalidRequest, NameTaken or UnsupportedModel before anything is
    published.
    """
    name = name or (domain.name if domain else "")
    check_names(home, name, domain.name if domain else None)
    if domain is None and adapter is None:
        raise InvalidRequest(f"{name} would be the base model.", hint="Give it a domain or an adapter.")
    with one_at_a_time(home):
        return _register(home, domain, name, adapter, pairing, evidence, system, progress, notes)


def _register(
    home: Home,
    domain: NewDomain | None,
    name: str,
    adapter: Path | None,
    pairing: Pairing | None,
    evidence: Evidence | None,
    system: str | None,
    progress: Progress,
    notes: Callable[[str], None],
) -> Card:
    release = home.release()
    base = home.models.get(home.settings.base_model, progress)
    with tempfile.TemporaryDirectory() as scratch:
        learned = learn(home, release, domain, Path(scratch) / "index", progress, notes) if domain else Learned()
        whose = pairing or Pairing(base, lambda lora: lora)
        made = _store(home, adapter, whose, Path(scratch) / "adapter", progress) if adapter else None
    card = _card(home, release, name, domain, made, base.identity, evidence, system)
    home.registry.publish(
        cards=[card],
        aliases={name: card.version},
        router=learned.router,
        indexes={card.domain: learned.index} if learned.index else {},
        note=f"add {card.version}",
    )
    return card


def _store(home: Home, adapter: Path, pairing: Pairing, scratch: Path, progress: Progress) -> tuple[Spec, Canary]:
    """The spec of the adapter, which is in the store then, and its canary."""
    lora = store_adapter(adapter, pairing.model, home.artifacts, scratch)
    progress("probing the adapter", 0, 0)
    return pairing.spec(lora), make_canary(home.artifacts.verify(lora.adapter), pairing.model)


def unregister(home: Home, name: str) -> Release:
    """Publish a release without the expert `name` and without what came with it.

    That is its domain's index of documents, and the router class where a user taught it; `versions.retire` keeps both. Raises
    UnknownExpert that lists the known ones, or InvalidRequest for the base model.
    """
    with one_at_a_time(home):
        return _unregister(home, name)


def _unregister(home: Home, name: str) -> Release:
    release = home.release()
    if name not in release.aliases:
        raise UnknownExpert(f"There is no expert {name!r}.", hint=f"Known: {', '.join(sorted(release.aliases))}.")
    if name in {home.settings.fallback, "base"}:
        raise InvalidRequest(f"{name} answers where no other expert does; it stays.")
    domain = home.registry.resolve(name, release).domain
    artifact = RouterArtifact.load(home.artifacts.verify(release.router))
    router = None
    rows = zip(artifact.rows.domains, artifact.rows.sources, strict=True)
    if {source for label, source in rows if label == domain} == {f"user:{domain}"}:
        router = store_router(home, artifact.without_domain(domain))
    return home.registry.publish(
        aliases={name: None},
        router=router,
        indexes={domain: None} if domain in release.indexes else {},
        note=f"remove {name}",
    )


@contextmanager
def one_at_a_time(home: Home) -> Iterator[None]:
    """Hold back others that build on the live release: of two new routers at once, one would forget the other's domain."""
    with FileLock(home.root / "register.lock"):
        yield


def _card(
    home: Home,
    release: Release,
    name: str,
    domain: NewDomain | None,
    made: tuple[Spec, Canary] | None,
    base: str,
    evidence: Evidence | None,
    system: str | None,
) -> Card:
    """The expert's card. Without a new adapter, an expert that is live stays what it is, with what was measured of it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = home.registry.card(release.aliases[name]) if name in release.aliases else None
    described = domain.description if domain else ""
    if made is None and before is not None and before.base == base:
        description = described or before.evidence.description
        return replace(before, evidence=replace(before.evidence, description=description))
    evidence = evidence or Evidence(description=described, created=now)
    spec, canary = made or (Base(), None)
    return Card(name, domain.name if domain else "", spec, base, system, replace(evidence, canary=canary))


def _check_name(name: str) -> None:
    if name in RESERVED or not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot be a name.",
            hint=f"Use small letters, digits, - and _, at most 64, and none of {', '.join(sorted(RESERVED))}.",
        )


def check_names(home: Home, name: str, domain: str | None) -> None:
    """Raise InvalidRequest where a name is malformed or reserved, NameTaken where another expert has the name or the domain."""
    for each in (name, *([domain] if domain is not None else [])):
        _check_name(each)
    release = home.release()
    for alias, card in home.cards(release).items():
        if alias == name and card.domain != (domain or ""):
            raise NameTaken(
                f"{name} answers for {card.domain or 'no domain'}, not for {domain or 'none'}.", hint="Remove it first."
            )
        if domain and card.domain == domain and alias != name:
            raise NameTaken(
                f"{alias} answers for {domain} already.", hint=f"Remove it first, or register {alias} again."
            )


def live_lora(home: Home, domain: str, base: CachedModel) -> Lora | None:
    """The adapter of this base model that answers for a domain now, where there is one."""
    cards = home.cards(home.release()).values()
    same = (card for card in cards if domain and card.domain == domain and card.base == base.identity)
    return next((card.spec for card in same if isinstance(card.spec, Lora)), None)
