"""Make a domain live: its index, its router class and its expert, as one release."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from ..models.encoder import Encoder
from ..retrieval import Chunk, build_index, chunk, read_documents
from ..router.artifact import RouterArtifact
from ..router.encoder import Encoders
from ..router.router import Router
from ..schema import Base, Canary, Card, Evidence, Lora, Release, Spec
from .recipes import Progress

RESERVED = frozenset({"auto", "base", "none"})
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
PASSAGES_FOR_ROUTER = 200
"""Passages that the router learns a domain from, at most; taken evenly over the documents."""
ENOUGH_PROMPTS = 20
"""Prompts from which the router learns a domain without its passages: documents read unlike what people ask about them."""


@dataclass(frozen=True, slots=True)
class NewDomain:
    """What a domain is made from: documents to answer from, prompts that belong to it, a description."""

    name: str
    description: str = ""
    docs: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()


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
    progress: Progress,
    notes: Callable[[str], None] = lambda note: None,
) -> Card:
    """Publish a release in which `name` (the domain's by default) answers for the domain; returns its card.

    A domain that the router knows keeps its class. An expert without a domain needs an adapter; it is asked for by name, and the
    router stays as it is. Without a `pairing`, the adapter is one of the base model. `notes` is told, a sentence each, what was
    not read. Raises InvalidRequest, NameTaken or UnsupportedModel before anything is published.
    """
    name = name or (domain.name if domain else "")
    check_names(home, name, domain.name if domain else None)
    if domain is None and adapter is None:
        raise InvalidRequest(f"{name} would be the base model.", hint="Give it a domain or an adapter.")
    with one_at_a_time(home):
        return _register(home, domain, name, adapter, pairing, evidence, progress, notes)


def _register(
    home: Home,
    domain: NewDomain | None,
    name: str,
    adapter: Path | None,
    pairing: Pairing | None,
    evidence: Evidence | None,
    progress: Progress,
    notes: Callable[[str], None],
) -> Card:
    release = home.release()
    base = home.models.get(home.settings.base_model, progress)
    with tempfile.TemporaryDirectory() as scratch:
        learned = _learn(home, release, domain, Path(scratch) / "index", progress, notes) if domain else Learned()
        whose = pairing or Pairing(base, lambda lora: lora)
        made = _store(home, adapter, whose, Path(scratch) / "adapter", progress) if adapter else None
    card = _card(home, release, name, domain, made, base.identity, evidence)
    home.registry.publish(
        cards=[card],
        aliases={name: card.version},
        router=learned.router,
        indexes={card.domain: learned.index} if learned.index else {},
        note=f"add {card.version}",
    )
    return card


@dataclass(frozen=True, slots=True)
class Learned:
    """The hashes of what a new domain needs: a router where the live one does not know it, an index where it has documents."""

    router: str | None = None
    index: str | None = None


def _learn(
    home: Home,
    release: Release,
    domain: NewDomain,
    scratch: Path,
    progress: Progress,
    notes: Callable[[str], None],
) -> Learned:
    encoder = home.models.get(home.settings.encoder, progress)
    chunks = _chunks(domain, notes)
    index = _index(home, chunks, encoder, scratch, progress)
    return Learned(_router(home, release, domain, chunks, encoder, progress), index)


def _store(home: Home, adapter: Path, pairing: Pairing, scratch: Path, progress: Progress) -> tuple[Spec, Canary]:
    """The spec of the adapter, which is in the store then, and its canary."""
    lora = store_adapter(adapter, pairing.model, home.artifacts, scratch)
    progress("probing the adapter", 0, 0)
    return pairing.spec(lora), make_canary(home.artifacts.verify(lora.adapter), pairing.model)


def unregister(home: Home, name: str) -> Release:
    """Publish a release without the expert `name`; a domain that was added by a user leaves the router and the indexes too.

    Raises UnknownExpert that lists the known ones, or InvalidRequest for the base model.
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
        indexes={domain: None} if router and domain in release.indexes else {},
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
    return Card(name, domain.name if domain else "", spec, base, evidence=replace(evidence, canary=canary))


def read_prompts(paths: Sequence[Path]) -> tuple[str, ...]:
    """Prompts of a domain: JSON lines with `prompt` or `text`, or any other text file, one a line.

    Raises InvalidRequest naming the file and the line.
    """
    prompts = []
    for path in paths:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{path} cannot be read: {error}.") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts.append(_prompt_of(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip())
    return tuple(prompts)


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        prompt = row.get("prompt") or row["text"]
    except (ValueError, LookupError, AttributeError):
        prompt = None
    if not isinstance(prompt, str):
        raise InvalidRequest(f"{where}: no prompt.", hint="A row is a JSON object with prompt (or text).")
    return prompt


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


def _chunks(domain: NewDomain, notes: Callable[[str], None]) -> list[Chunk]:
    if not domain.docs:
        return []
    documents, unread = read_documents(domain.docs)
    for sentence in unread:
        notes(sentence)
    return [piece for document in documents for piece in chunk(document)]


def _index(home: Home, chunks: list[Chunk], model: CachedModel, folder: Path, progress: Progress) -> str | None:
    if not chunks:
        return None
    folder.mkdir()
    encoder = Encoder(model)
    build_index(
        chunks,
        encoder.encode,
        folder,
        encoder_id=encoder.identity,
        progress=lambda done, of: progress("indexing passages", done, of),
    )
    return home.artifacts.put(folder)


def _router(
    home: Home,
    release: Release,
    domain: NewDomain,
    chunks: list[Chunk],
    model: CachedModel,
    progress: Progress,
) -> str | None:
    """The hash of a router that knows the domain, None where the live one does."""
    artifact = RouterArtifact.load(home.artifacts.verify(release.router))
    if domain.name in artifact.head.domains:
        return None
    progress("teaching the router", 0, 0)
    router = Router(artifact, open_encoders(home, model))
    every = max(1, -(-len(chunks) // PASSAGES_FOR_ROUTER))
    passages = [piece.text for piece in chunks[::every]] if len(domain.prompts) < ENOUGH_PROMPTS else []
    artifact = router.add_domain(domain.name, [*domain.prompts, *passages], domain.description)
    return store_router(home, artifact)


def open_encoders(home: Home, model: CachedModel) -> Encoders:
    """The encoders of a home's routers, as its settings have them."""
    settings = home.settings
    return Encoders(model, precision=settings.encoder_precision, threads=settings.threads, device=settings.device)


def store_router(home: Home, artifact: RouterArtifact) -> str:
    """Put a fitted router into the artifact store; returns its content hash."""
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder))
        return home.artifacts.put(Path(folder))
