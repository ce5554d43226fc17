"""Fit a whole router from labelled prompts: what the shipped one was made with."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidRequest
from ..models.cache import sha256
from ..models.encoder import Encoder
from .artifact import RouterArtifact, Rows
from .fit import calibrate, fit_head
from .head import Head
from .questions import free_questions

ROWS_PER_SOURCE = 400
"""Rows kept of each source, so that the artifact stays small; sources weigh the same whatever their size."""
FALSE_REJECTS = 0.05
"""Share of held-out prompts of known domains that the open-set threshold refuses."""


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """A prompt of a known domain; `source` names the data set that it is from, `id` its place there."""

    text: str
    domain: str
    source: str
    id: str


def read_labelled(path: Path) -> list[LabelledPrompt]:
    """Read JSON lines with text, domain and source, gzipped or not. Raises InvalidRequest naming file and line."""
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                rows.append(LabelledPrompt(row["text"], row["domain"], row["source"], f"{path.name}:{number}"))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(
            f"{path}, row {len(rows) + 1}: {error}.", hint="A row is a JSON object with text, domain and source."
        ) from None
    return rows


def build_router(
    training: Path, held_out: Path, encoder: Encoder, progress: Callable[[str, int, int], None]
) -> RouterArtifact:
    """Fit on `training` and this project's own questions; calibrate on `held_out`, whose sources `training` lacks."""
    train = _sample(read_labelled(training)) + _own_questions()
    dev = read_labelled(held_out)
    if shared := {row.source for row in train} & {row.source for row in dev}:
        raise InvalidRequest(
            f"{held_out} shares the sources {', '.join(sorted(shared))} with {training}.",
            hint="Hold out whole sources: a random split measures the style of a data set, not its domain.",
        )
    progress("embedding", 0, len(train) + len(dev))
    rows = embed(train, encoder)
    dev_rows = embed(dev, encoder)
    progress("fitting", 0, 0)
    head = fit_head(rows.embeddings, rows.domains, rows.sources)
    head = calibrate(head, dev_rows.embeddings, dev_rows.domains, dev_rows.sources, FALSE_REJECTS)
    provenance = {
        "training": {"file": training.name, "sha256": sha256(training), "rows": len(train)},
        "held_out": {"file": held_out.name, "sha256": sha256(held_out), "rows": len(dev)},
        "sources": sorted({f"{row.domain}/{row.source}" for row in train}),
        "accuracy": accuracy_by_source(head, dev_rows),
        "false_rejects": FALSE_REJECTS,
    }
    return RouterArtifact(head, rows, encoder.identity, provenance)


def accuracy_by_source(head: Head, rows: Rows) -> dict[str, float]:
    """Share of each source's rows that go to their domain, and `mean` over the sources."""
    best = np.asarray(head.domains)[head.probabilities(rows.embeddings).argmax(axis=1)]
    right: dict[str, list[bool]] = defaultdict(list)
    for guess, domain, source in zip(best, rows.domains, rows.sources, strict=True):
        right[f"{domain}/{source}"].append(bool(guess == domain))
    accuracy: dict[str, Any] = {source: round(float(np.mean(hits)), 4) for source, hits in sorted(right.items())}
    return {**accuracy, "mean": round(float(np.mean(list(accuracy.values()))), 4)}


def _sample(rows: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    groups: dict[tuple[str, str], list[LabelledPrompt]] = defaultdict(list)
    for row in rows:
        groups[row.domain, row.source].append(row)
    rng = random.Random(0)
    return [row for _, group in sorted(groups.items()) for row in rng.sample(group, min(ROWS_PER_SOURCE, len(group)))]


def _own_questions() -> list[LabelledPrompt]:
    questions = free_questions().items()
    return [
        LabelledPrompt(text, domain, "questions", f"questions.yaml:{domain}:{number}")
        for domain, texts in questions
        for number, text in enumerate(texts, 1)
    ]


def embed(rows: Sequence[LabelledPrompt], encoder: Encoder) -> Rows:
    """The rows with their embeddings."""
    return Rows(
        encoder.encode([row.text for row in rows]),
        tuple(row.domain for row in rows),
        tuple(row.source for row in rows),
        tuple(row.id for row in rows),
    )
