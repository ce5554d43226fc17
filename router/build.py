"""Fit a whole router from labelled prompts: what the shipped one was made with."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..models.cache import sha256
from .artifact import RouterArtifact
from .encoder import Encoders
from .fit import calibrate, fit_head
from .prompts import own_prompts
from .rows import BACKGROUND, Rows
from .spelling import words_of

ROWS_PER_SOURCE = 150
"""Stored rows of each source, so that the artifact stays small; sources weigh the same whatever their size."""
FALSE_REJECTS = 0.05
"""Share of prompts of known domains that the open-set threshold refuses."""


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """A prompt of a domain (or of `rows.BACKGROUND`); `source` names the data set that it is from, `id` its place there."""

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
                text, domain, source = row["text"], row["domain"], row["source"]
                if not all(isinstance(value, str) for value in (text, domain, source)):
                    raise TypeError("text, domain and source are text")
                rows.append(LabelledPrompt(text, domain, source, f"{path.name}:{number}"))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(
            f"{path}, row {len(rows) + 1}: {error}.", hint="A row is a JSON object with text, domain and source."
        ) from None
    return rows


def read_pair(training: Path, held_out: Path) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
    """Rows to fit on, this project's own prompts among them, and rows to calibrate on.

    Raises InvalidRequest where both share a source, or `held_out` is empty or has a domain that `training` lacks.
    """
    train, dev = read_labelled(training), read_labelled(held_out)
    if shared := {row.source for row in train} & {row.source for row in dev}:
        raise InvalidRequest(
            f"{held_out} shares the sources {', '.join(sorted(shared))} with {training}.",
            hint="Hold out whole sources: a random split measures the style of a data set, not its domain.",
        )
    domains = {row.domain for row in train} - {BACKGROUND}
    if strange := sorted({row.domain for row in dev} - domains):
        raise InvalidRequest(
            f"{held_out} has the domains {', '.join(map(repr, strange))}, which {training} lacks.",
            hint=f"Domains to calibrate: {', '.join(sorted(domains))}.",
        )
    if not dev:
        raise InvalidRequest(f"{held_out} has no rows.", hint="Calibration needs prompts of every domain.")
    own = [LabelledPrompt(*row) for row in own_prompts()]
    return train + [row for row in own if row.domain in {BACKGROUND, *domains}], dev


def build_router(
    train: Sequence[LabelledPrompt],
    dev: Sequence[LabelledPrompt],
    encoders: Encoders,
    adapter: Path | None,
    progress: Callable[[str, int, int], None],
    provenance: dict[str, Any] | None = None,
) -> RouterArtifact:
    """Fit a head on some rows of each source of `train`, and calibrate it on `dev`, of sources that `train` lacks."""
    kept = some_of_each_source(train, ROWS_PER_SOURCE)
    words = words_of((row.text for row in train), least=2)  # what occurs once may be an error itself
    encoder = encoders.get(adapter, words)
    progress("embedding", 0, len(kept) + len(dev))
    rows, held_out = (embed(part, encoder.encode) for part in (kept, dev))
    progress("fitting", 0, 0)
    head, open_set = calibrate(fit_head(rows), rows, held_out)
    identity = encoders.identity(adapter)
    artifact = RouterArtifact(head, open_set, rows, FALSE_REJECTS, identity, adapter, {}, words)
    measured = {
        "sources": sorted({f"{row.domain}/{row.source}" for row in kept}),
        "rows": len(kept),
        "accuracy": artifact.accuracy(held_out),
    }
    return replace(artifact, provenance={**(provenance or {}), **measured})


def described(training: Path, held_out: Path) -> dict[str, Any]:
    """The data's names and hashes, for an artifact's provenance."""
    return {
        "training": {"file": training.name, "sha256": sha256(training)},
        "held_out": {"file": held_out.name, "sha256": sha256(held_out)},
    }


def some_of_each_source(rows: Sequence[LabelledPrompt], most: int) -> list[LabelledPrompt]:
    """At most so many of each source of a domain, drawn at random, the same ones each time."""
    groups: dict[tuple[str, str], list[LabelledPrompt]] = defaultdict(list)
    for row in rows:
        groups[row.domain, row.source].append(row)
    rng = random.Random(0)
    return [row for _, group in sorted(groups.items()) for row in rng.sample(group, min(most, len(group)))]


def embed(rows: Sequence[LabelledPrompt], encode: Callable[[list[str]], Any]) -> Rows:
    """The rows with their embeddings, without their texts."""
    return Rows(
        encode([row.text for row in rows]),
        tuple(row.domain for row in rows),
        tuple(row.source for row in rows),
        tuple(row.id for row in rows),
        (None,) * len(rows),
    )
