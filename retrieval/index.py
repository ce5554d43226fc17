"""Chunks as vectors in a folder, and the search over them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactCorrupt, InvalidRequest
from ..schema import Passage
from .chunk import Chunk

if TYPE_CHECKING:
    from pathlib import Path

    import faiss

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""n texts to [n, d], each row of length 1."""

BATCH = 32
VECTORS, PASSAGES, META = "index.faiss", "passages.jsonl", "meta.json"
HEADER = struct.Struct("<4siqqqBiQ")
"""How FAISS begins an IndexFlatIP: kind, dimension, vectors, two unused, trained, metric, numbers that follow."""


def build_index(
    chunks: Sequence[Chunk],
    encode: Encode,
    folder: Path,
    *,
    encoder_id: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the vectors, passages and meta data of `chunks` into `folder`; equal input gives equal bytes.

    `progress` is called with (chunks done, chunks in all) after each batch. Not atomic: give a folder that nobody
    reads. Raises InvalidRequest where there is no chunk.
    """
    import faiss

    if not chunks:
        raise InvalidRequest("There is nothing to index.", hint="Give at least one document with text in it.")
    vectors = _encode(chunks, encode, progress)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    rows = [{"text": chunk.text, "document": chunk.document, "span": chunk.span} for chunk in chunks]
    meta = {"dimension": vectors.shape[1], "count": len(chunks), "encoder_id": encoder_id}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VECTORS).write_bytes(faiss.serialize_index(flat).tobytes())
    # ASCII: a lone surrogate in a text has no UTF-8 form.
    (folder / PASSAGES).write_text("".join(json.dumps(row) + "\n" for row in rows), "ascii")
    (folder / META).write_text(json.dumps(meta, sort_keys=True) + "\n", "ascii")


def _encode(
    chunks: Sequence[Chunk], encode: Encode, progress: Callable[[int, int], None] | None
) -> NDArray[np.float32]:
    batches = []
    for start in range(0, len(chunks), BATCH):
        batches.append(encode([chunk.text for chunk in chunks[start : start + BATCH]]))
        if progress:
            progress(min(start + BATCH, len(chunks)), len(chunks))
    return np.ascontiguousarray(np.concatenate(batches), dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """A loaded index; searches may run in several threads at once.

    `encoder_id` is the identity of the encoder whose vectors it holds: only that one's vectors can be searched for.
    """

    encoder_id: str
    passages: tuple[Passage, ...]
    flat: faiss.Index

    @classmethod
    def load(cls, folder: Path, version: str) -> Self:
        """Read what `build_index` wrote; raises ArtifactCorrupt with the file that is missing or wrong."""
        meta = _load_meta(folder / META)
        passages = _load_passages(folder / PASSAGES, version)
        flat = _load_vectors(folder / VECTORS)
        if not meta["count"] == len(passages) == flat.ntotal:
            counts = f"{META} says {meta['count']}, {PASSAGES} has {len(passages)}, {VECTORS} has {flat.ntotal}"
            raise _corrupt(folder, f"the numbers of passages differ: {counts}")
        if meta["dimension"] != flat.d:
            raise _corrupt(folder / VECTORS, f"its vectors have {flat.d} numbers, {META} says {meta['dimension']}")
        return cls(meta["encoder_id"], passages, flat)

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def documents(self) -> tuple[str, ...]:
        """The names of the documents, in the order in which they were indexed."""
        return tuple(dict.fromkeys(passage.document for passage in self.passages))

    def search(self, vector: NDArray[np.float32], k: int, min_score: float = -1.0) -> tuple[Passage, ...]:
        """Find the `k` passages of highest cosine to `vector` ([d], length 1), best first, none below `min_score`.

        Raises InvalidRequest where `vector` cannot come from the encoder that the index was built with.
        """
        if vector.shape != (self.flat.d,):
            raise InvalidRequest(
                f"The index holds vectors of shape ({self.flat.d},) and was asked for one of shape {vector.shape}.",
                hint="Build the index again with the encoder that is in use.",
            )
        if k < 1:
            return ()
        query = np.ascontiguousarray(vector[None], dtype=np.float32)
        scores, rows = self.flat.search(query, min(k, len(self)))
        found = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
        # FAISS fills up with row -1 where the query is not a number.
        return tuple(
            replace(self.passages[row], score=score) for score, row in found if row >= 0 and score >= min_score
        )


def _load_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(_bytes(path))
        return {"count": int(meta["count"]), "dimension": int(meta["dimension"]), "encoder_id": str(meta["encoder_id"])}
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"it is not the meta data of an index ({error!r})") from None


def _load_passages(path: Path, version: str) -> tuple[Passage, ...]:
    passages = []
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            start, end = row["span"]
            passages.append(Passage(row["text"], row["document"], (start, end), None, 0.0, version))
        except (ValueError, KeyError, TypeError) as error:
            raise _corrupt(path, f"line {number} is not a passage ({error!r})") from None
    return tuple(passages)


def _load_vectors(path: Path) -> faiss.Index:
    import faiss

    data = _bytes(path)
    _check_header(path, data)
    try:
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except RuntimeError:  # what FAISS says names its own source files, not the user's
        raise _corrupt(path, "FAISS cannot read it") from None


def _check_header(path: Path, data: bytes) -> None:
    """FAISS believes the lengths in a file: one wrong byte makes it take all memory before it finds the end."""
    if len(data) < HEADER.size:
        raise _corrupt(path, "it is not a FAISS index")
    kind, dimension, count, _, _, _, metric, numbers = HEADER.unpack_from(data)
    if (kind, metric) != (b"IxFI", 0):
        raise _corrupt(path, "it is not a FAISS index of the kind IndexFlatIP")
    if dimension < 1 or numbers != dimension * count or len(data) != HEADER.size + 4 * numbers:
        raise _corrupt(path, "a part of it is missing or its header is wrong")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _corrupt(path, f"it cannot be read ({error.strerror})") from None


def _corrupt(path: Path, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"{path} is damaged: {what}.", hint="Build the domain's index again from its documents.")
