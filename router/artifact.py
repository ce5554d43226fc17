"""A fitted router as a folder: the head, the embeddings it was fitted on, where they come from, and the encoder's adapter.

The embeddings are kept (float16, with source and id; text only where the domain is the user's own), so that a domain can be
added, the head refitted and a decision explained anywhere in seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactCorrupt, InvalidRequest, NameTaken, UnknownDomain
from ..models.encoder import CONFIG, WEIGHTS
from ..models.windows import read_json
from .fit import add_class, drop_class, fit_head, right_by_source, views
from .head import Floats, Head
from .neighbours import vote
from .openset import OpenSet
from .policy import Scores
from .rows import Rows

ADAPTER = "adapter"
"""The encoder's adapter, inside the router's folder."""
FORMAT = 2
FEWEST = 2
"""Domains that a router cannot do without."""


@dataclass(frozen=True, slots=True, eq=False)
class RouterArtifact:
    """A head with its rows. Immutable: learning or forgetting a domain gives a new one.

    `encoder` is the identity of what made the embeddings; `adapter` is the PEFT folder that tunes it, None where it is used as
    it is. `words` are those of the prompts that it learned from: they are no typing errors. A prompt whose open-set p-value is
    below `threshold` fits no domain. `provenance` says what it was fitted on and what was measured.
    """

    head: Head
    open_set: OpenSet
    rows: Rows
    threshold: float
    encoder: str
    adapter: Path | None
    provenance: dict[str, Any]
    words: frozenset[str] = frozenset()

    def scores(
        self, embeddings: Floats, version: str = "unsaved", *, domains: Collection[str] | None = None
    ) -> list[Scores]:
        """One `Scores` for each of [n, dimension] embeddings. With `domains`, only these are weighed.

        Raises UnknownDomain for a domain that the router does not know, InvalidRequest where `domains` is empty.
        """
        known = ", ".join(self.head.domains)
        if domains is not None and not domains:
            raise InvalidRequest("No domain is left to choose from.", hint=f"Known domains: {known}.")
        if domains is not None and (unknown := set(domains) - set(self.head.domains)):
            raise UnknownDomain(f"No domain {', '.join(sorted(unknown))}.", hint=f"Known domains: {known}.")
        votes = vote(self.rows, embeddings, self.head.domains)
        familiar = self.open_set.p_values(views(self.head, votes, embeddings))
        out = []
        for embedding, row, p_value in zip(
            embeddings, self.head.probabilities(embeddings, votes.shares), familiar, strict=True
        ):
            probabilities = {name: float(p) for name, p in zip(self.head.domains, row, strict=True)}
            if domains is not None:
                total = sum(probabilities[name] for name in domains)
                probabilities = {
                    name: probabilities[name] / total if total else 1 / len(domains) for name in sorted(domains)
                }
            chosen = self.head.prediction_set(probabilities)
            out.append(Scores(embedding, probabilities, chosen, float(p_value), self.threshold, version))
        return out

    def accuracy(self, held_out: Rows) -> dict[str, float]:
        """Share of each source's rows whose likeliest domain is theirs, and `mean` over the sources."""
        return right_by_source([one.domain for one in self.scores(held_out.embeddings)], held_out)

    def with_domain(self, name: str, added: Rows) -> RouterArtifact:
        """Knows one more domain, from its rows, in less than a second.

        The regression's weights of the others stay as they are; the neighbours' votes may shift a little.

        Raises NameTaken.
        """
        if name in self.head.domains:
            raise NameTaken(
                f"The router knows a domain {name!r} already.", hint="Remove it first, or choose another name."
            )
        rows = self.rows.plus(added)
        return replace(self, head=add_class(self.head, rows, name), rows=rows)

    def without_domain(self, name: str) -> RouterArtifact:
        """Knows one domain less. Raises UnknownDomain, or InvalidRequest for one of the last two."""
        if name not in self.head.domains:
            raise UnknownDomain(f"No domain {name!r}.", hint=f"Known domains: {', '.join(self.head.domains)}.")
        if len(self.head.domains) <= FEWEST:
            raise InvalidRequest("A router needs two domains at least.")
        return replace(self, head=drop_class(self.head, name), rows=self.rows.where(lambda domain: domain != name))

    def refitted(self) -> RouterArtifact:
        """The head fitted anew on all stored rows, which weighs every domain's prompts against every other's.

        Temperature, prediction sets and familiarity were set on held-out rows that a user does not have; they are kept.
        """
        before = self.head
        fitted = fit_head(self.rows)
        head = replace(fitted, temperature=before.temperature, coverage=before.coverage, least=before.least)
        return replace(self, head=head)

    def save(self, folder: Path) -> None:
        """Write into `folder`, which exists; equal content gives equal bytes."""
        from safetensors.numpy import save_file

        arrays = {
            "weights": self.head.weights,
            "bias": self.head.bias,
            "embeddings": self.rows.embeddings.astype(np.float16),
        }
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "router.safetensors")
        body = {
            "format": FORMAT,
            "head": self.head.to_dict(),
            "open_set": self.open_set.to_dict(),
            "threshold": self.threshold,
            "encoder": self.encoder,
            "provenance": self.provenance,
        }
        (folder / "router.json").write_text(json.dumps(body, indent=1, sort_keys=True), "utf-8")
        rows = [
            list(row) for row in zip(self.rows.domains, self.rows.sources, self.rows.ids, self.rows.texts, strict=True)
        ]
        (folder / "rows.json").write_text(json.dumps(rows, separators=(",", ":")), "utf-8")
        (folder / "words.json").write_text(json.dumps(sorted(self.words), separators=(",", ":")), "utf-8")
        if self.adapter:
            _copy_adapter(self.adapter, folder / ADAPTER)

    @classmethod
    def load(cls, folder: Path) -> RouterArtifact:
        """Read a saved folder; raises ArtifactCorrupt that names what is wrong."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / "router.safetensors")
            body = json.loads((folder / "router.json").read_text("utf-8"))
            if body.get("format") != FORMAT:
                raise ArtifactCorrupt(
                    f"The router in {folder} was made by another version of Collegium.",
                    hint="Fit it again with `collegium router fit`, or begin a new home.",
                )
            rows = json.loads((folder / "rows.json").read_text("utf-8"))
            if len(rows) != len(arrays["embeddings"]):
                raise ValueError(f"rows.json has {len(rows)} rows, router.safetensors {len(arrays['embeddings'])}")
            head = dict(body["head"], weights=arrays["weights"], bias=arrays["bias"])
            return cls(
                Head(**{**head, "domains": tuple(head["domains"])}),
                OpenSet.from_dict(body["open_set"]),
                Rows(arrays["embeddings"].astype(np.float32), *(tuple(row[i] for row in rows) for i in range(4))),
                float(body["threshold"]),
                body["encoder"],
                folder / ADAPTER if (folder / ADAPTER).is_dir() else None,
                body["provenance"],
                frozenset(json.loads((folder / "words.json").read_text("utf-8"))),
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise ArtifactCorrupt(
                f"The router in {folder} cannot be read: {error}.", hint="Roll back to an earlier release."
            ) from error


def _copy_adapter(source: Path, target: Path) -> None:
    """Its weights, and its configuration without the path of the base model, which is that of one machine."""
    target.mkdir()
    config = {**read_json(source / CONFIG), "base_model_name_or_path": None}
    (target / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), "utf-8")
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
