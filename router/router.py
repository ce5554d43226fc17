"""Text to scores over domains; and new domains, learned on stored embeddings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Self

from ..errors import ArtifactCorrupt, InvalidRequest, NameTaken, UnknownDomain
from ..models.encoder import Encoder
from .artifact import RouterArtifact, Rows
from .fit import fit_head
from .policy import Scores

FEWEST = 2
"""Domains that a router cannot do without."""


class Router:
    """A fitted router with its encoder. Immutable: learning a domain gives a new one."""

    def __init__(self, artifact: RouterArtifact, encoder: Encoder, version: str = "unsaved") -> None:
        if artifact.encoder != encoder.identity:
            raise ArtifactCorrupt(
                f"The router was fitted on the encoder {artifact.encoder}, this is {encoder.identity}.",
                hint="Set `encoder` back, or fit the router again.",
            )
        self.artifact = artifact
        self.version = version
        self._encoder = encoder

    @classmethod
    def load(cls, folder: Path, encoder: Encoder, version: str = "unsaved") -> Self:
        """The router of a saved folder. Raises ArtifactCorrupt where it cannot be read or belongs to another encoder."""
        return cls(RouterArtifact.load(folder), encoder, version)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it tells apart."""
        return self.artifact.head.domains

    def scores(self, texts: Sequence[str], *, domains: Collection[str] | None = None) -> list[Scores]:
        """One `Scores` a text. With `domains`, only these are weighed.

        Raises UnknownDomain for a domain that the router does not know, InvalidRequest where `domains` is empty.
        """
        if domains is not None and not domains:
            raise InvalidRequest("No domain is left to choose from.", hint=f"Known domains: {', '.join(self.domains)}.")
        if domains is not None and (unknown := set(domains) - set(self.domains)):
            raise UnknownDomain(
                f"No domain {', '.join(sorted(unknown))}.", hint=f"Known domains: {', '.join(self.domains)}."
            )
        head = self.artifact.head
        out = []
        embeddings = self._encoder.encode(texts)
        for embedding, row in zip(embeddings, head.probabilities(embeddings), strict=True):
            probabilities = {name: float(p) for name, p in zip(head.domains, row, strict=True)}
            confidence = max(probabilities.values())
            if domains is not None:
                total = sum(probabilities[name] for name in domains)
                probabilities = {
                    name: probabilities[name] / total if total else 1 / len(domains) for name in sorted(domains)
                }
            chosen = head.prediction_set(probabilities)
            out.append(Scores(embedding, probabilities, chosen, confidence, head.threshold, self.version))
        return out

    def add_domain(self, name: str, examples: Sequence[str] = (), description: str = "") -> RouterArtifact:
        """A router that also knows `name`, from example prompts, a description, or both.

        The encoder stays as it is and the head is refitted on the stored embeddings, so it takes seconds. Raises NameTaken,
        or InvalidRequest where neither examples nor a description say what the domain is about.
        """
        if name in self.domains:
            raise NameTaken(
                f"The router knows a domain {name!r} already.", hint="Remove it first, or choose another name."
            )
        texts = list(dict.fromkeys(text.strip() for text in examples if text.strip()))
        if description.strip():
            texts += _from_description(name, description.strip())
        if not texts:
            raise InvalidRequest(
                f"Nothing says what {name!r} is about.", hint="Give examples, documents or a description."
            )
        ids = tuple(sha256(text.encode()).hexdigest()[:16] for text in texts)
        added = Rows(self._encoder.encode(texts), (name,) * len(texts), (f"user:{name}",) * len(texts), ids)
        return self._refit(self.artifact.rows.plus(added))

    def remove_domain(self, name: str) -> RouterArtifact:
        """A router that no longer knows `name`. Raises UnknownDomain, or InvalidRequest for one of the last two."""
        if name not in self.domains:
            raise UnknownDomain(f"No domain {name!r}.", hint=f"Known domains: {', '.join(self.domains)}.")
        if len(self.domains) <= FEWEST:
            raise InvalidRequest("A router needs two domains at least.")
        return self._refit(self.artifact.rows.without(name))

    def _refit(self, rows: Rows) -> RouterArtifact:
        before = self.artifact.head
        fitted = fit_head(rows.embeddings, rows.domains, rows.sources)
        # Temperature and threshold were set on held-out rows that a user does not have; they hold for the new head too.
        head = replace(fitted, temperature=before.temperature, threshold=before.threshold, coverage=before.coverage)
        return self.artifact.with_head(head, rows)


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
