"""A fitted router as a folder: the head, the embeddings it was fitted on, and where they come from.

The embeddings are kept (float16, with source and id, never the text), so that a domain can be added or the head refitted
anywhere in seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactCorrupt
from .head import Floats, Head


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a head is fitted on: `embeddings` [n, dimension], and the domain, source and id of each."""

    embeddings: Floats
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.domains)

    def without(self, domain: str) -> Rows:
        """The rows of all other domains."""
        keep = [index for index, name in enumerate(self.domains) if name != domain]
        return Rows(
            self.embeddings[keep],
            tuple(self.domains[i] for i in keep),
            tuple(self.sources[i] for i in keep),
            tuple(self.ids[i] for i in keep),
        )

    def plus(self, other: Rows) -> Rows:
        """These rows and the other's."""
        return Rows(
            np.vstack([self.embeddings, other.embeddings]),
            self.domains + other.domains,
            self.sources + other.sources,
            self.ids + other.ids,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RouterArtifact:
    """A head with its rows and its `provenance` (encoder identity, data hashes, what was measured)."""

    head: Head
    rows: Rows
    encoder: str
    provenance: dict[str, Any]

    def with_head(self, head: Head, rows: Rows) -> RouterArtifact:
        """The same provenance under a new fit."""
        return replace(self, head=head, rows=rows)

    def save(self, folder: Path) -> None:
        """Write into `folder`, which exists; equal content gives equal bytes."""
        from safetensors.numpy import save_file

        arrays = {
            "weights": self.head.weights,
            "bias": self.head.bias,
            "embeddings": self.rows.embeddings.astype(np.float16),
        }
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "router.safetensors")
        body = {"head": self.head.to_dict(), "encoder": self.encoder, "provenance": self.provenance}
        (folder / "router.json").write_text(json.dumps(body, indent=1, sort_keys=True), "utf-8")
        rows = [list(row) for row in zip(self.rows.domains, self.rows.sources, self.rows.ids, strict=True)]
        (folder / "rows.json").write_text(json.dumps(rows, separators=(",", ":")), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> RouterArtifact:
        """Read a saved folder; raises ArtifactCorrupt that names what is wrong."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / "router.safetensors")
            body = json.loads((folder / "router.json").read_text("utf-8"))
            rows = json.loads((folder / "rows.json").read_text("utf-8"))
            head = body["head"]
            if len(rows) != len(arrays["embeddings"]):
                raise ValueError(f"rows.json has {len(rows)} rows, router.safetensors {len(arrays['embeddings'])}")
            return cls(
                Head(
                    tuple(head["domains"]),
                    arrays["weights"],
                    arrays["bias"],
                    head["temperature"],
                    head["threshold"],
                    head["coverage"],
                ),
                Rows(arrays["embeddings"].astype(np.float32), *(tuple(row[i] for row in rows) for i in range(3))),
                body["encoder"],
                body["provenance"],
            )
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise ArtifactCorrupt(
                f"The router in {folder} cannot be read: {error}.", hint="Roll back to an earlier release."
            ) from error
