"""A new domain: what it is made from, and what the router and retrieval need to know of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InvalidRequest
from ..experts.home import Home
from ..models.cache import CachedModel
from ..models.encoder import Encoder
from ..retrieval import Chunk, Document, build_index, chunk, read_documents
from ..router.artifact import RouterArtifact
from ..router.encoder import Encoders
from ..router.router import Router
from ..schema import Release
from .documents.reading import likely_questions
from .watch import Progress

PASSAGES_FOR_ROUTER = 200
"""Passages that the router learns a domain from, at most; taken evenly over the documents."""
QUESTIONS_FOR_ROUTER = 450
"""Questions that are made of documents for the router, at most."""
ENOUGH_PROMPTS = 20
"""Prompts from which the router learns a domain without its documents: those read unlike what people ask about them."""


@dataclass(frozen=True, slots=True)
class NewDomain:
    """What a domain is made from: documents to answer from, prompts that belong to it, a description.

    `docs` are files and folders to read, `documents` were read already.
    """

    name: str
    description: str = ""
    docs: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()
    documents: tuple[Document, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Learned:
    """The hashes of what a new domain needs: a router where the live one does not know it, an index where it has documents."""

    router: str | None = None
    index: str | None = None


def learn(
    home: Home,
    release: Release,
    domain: NewDomain,
    scratch: Path,
    progress: Progress,
    notes: Callable[[str], None],
) -> Learned:
    """Build the domain's index in the folder `scratch`, and teach it to the router; both are in the store then."""
    encoder = home.models.get(home.settings.encoder, progress)
    documents = _documents(domain, notes)
    chunks = [piece for document in documents for piece in chunk(document)]
    index = _index(home, chunks, encoder, scratch, progress)
    if len(domain.prompts) < ENOUGH_PROMPTS:
        asked = likely_questions(documents, domain.name.replace("-", " "), seed=0, limit=QUESTIONS_FOR_ROUTER)
        domain = replace(domain, prompts=(*domain.prompts, *asked))
    return Learned(_router(home, release, domain, chunks, encoder, progress), index)


def _documents(domain: NewDomain, notes: Callable[[str], None]) -> list[Document]:
    documents = list(domain.documents)
    if domain.docs:
        read, unread = read_documents(domain.docs)
        documents += read
        for sentence in unread:
            notes(sentence)
    return documents


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
