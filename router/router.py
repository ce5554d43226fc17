"""Text to scores over domains; new domains from examples or a description; and why a prompt was scored as it was."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import ArtifactCorrupt, InvalidRequest
from .artifact import RouterArtifact
from .encoder import Encoders
from .explain import Explanation, explain
from .head import Floats
from .policy import Scores
from .rows import Rows
from .spelling import words_of

REMEMBERED = 4096
"""Prompts whose embeddings are kept: a conversation asks for its earlier turns again and again."""


class Router:
    """A fitted router with its encoder. Immutable: learning a domain gives a new artifact."""

    def __init__(self, artifact: RouterArtifact, encoders: Encoders, version: str = "unsaved") -> None:
        if artifact.encoder != (here := encoders.identity(artifact.adapter)):
            raise ArtifactCorrupt(
                f"The router was fitted on the encoder {artifact.encoder}, this is {here}.",
                hint="Set `encoder` back, or fit the router again.",
            )
        self.artifact = artifact
        self.version = version
        self._encoder = encoders.get(artifact.adapter, artifact.words)
        self._remembered: OrderedDict[bytes, Floats] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path, encoders: Encoders, version: str = "unsaved") -> Self:
        """The router of a saved folder. Raises ArtifactCorrupt where it cannot be read or belongs to another encoder."""
        return cls(RouterArtifact.load(folder), encoders, version)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it tells apart."""
        return self.artifact.head.domains

    def scores(self, texts: Sequence[str], *, domains: Collection[str] | None = None) -> list[Scores]:
        """One `Scores` a text. With `domains`, only these are weighed; raises what `RouterArtifact.scores` does."""
        return self.artifact.scores(self.embed(texts), self.version, domains=domains)

    def embed(self, texts: Sequence[str]) -> Floats:
        """Embeddings [n, dimension]; those of recent texts are remembered."""
        keys = {text: sha256(text.encode()).digest() for text in texts}  # a prompt may be long, and is nobody's to keep
        with self._lock:
            found = {text: self._remembered[key] for text, key in keys.items() if key in self._remembered}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            found.update(zip(new, self._encoder.encode(new), strict=True))
        with self._lock:
            for text, embedding in found.items():
                self._remembered[keys[text]] = embedding
                self._remembered.move_to_end(keys[text])
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return (
            np.stack([found[text] for text in texts]) if texts else np.zeros((0, self._encoder.dimension), np.float32)
        )

    def explain(self, text: str) -> Explanation:
        """What speaks for each domain: the stored prompts nearest to this one, and the score against its threshold."""
        return explain(self.artifact, self.embed([text])[0], self.version)

    def add_domain(self, name: str, examples: Sequence[str] = (), description: str = "") -> RouterArtifact:
        """A router that also knows `name`, from example prompts, a description, or both; the encoder stays as it is.

        Raises NameTaken, or InvalidRequest where neither examples nor a description say what the domain is about.
        """
        texts = list(dict.fromkeys(text.strip() for text in examples if text.strip()))
        if description.strip():
            texts += _from_description(name, description.strip())
        if not texts:
            raise InvalidRequest(
                f"Nothing says what {name!r} is about.", hint="Give examples, documents or a description."
            )
        ids = tuple(sha256(text.encode()).hexdigest()[:16] for text in texts)
        n = len(texts)
        added = Rows(self._encoder.encode(texts), (name,) * n, (f"user:{name}",) * n, ids, tuple(texts))
        learned = self.artifact.with_domain(name, added)
        return replace(learned, words=learned.words | words_of(texts))

    def remove_domain(self, name: str) -> RouterArtifact:
        """A router that no longer knows `name`. Raises UnknownDomain, or InvalidRequest for one of the last two."""
        return self.artifact.without_domain(name)


def _from_description(name: str, description: str) -> list[str]:
    """Stand-ins for prompts that nobody has written yet: the label and its description as a person might ask."""
    return [
        description,
        name,
        f"{name}: {description}",
        f"A question about {name}.",
        f"I have a question about {description}",
        f"What is {name}?",
        f"How do I use {name}?",
        f"Explain {description}",
    ]
