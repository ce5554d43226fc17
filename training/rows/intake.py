"""What a job trains on and measures with: rows that were read, checked, searched for planted ones, and split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InvalidRequest
from ...retrieval import Document, read_documents
from ..plan import Plan
from ..stages import Stages
from .curate import curate
from .examples import Example, from_json, read_examples, to_json
from .poison import scan, scan_texts
from .split import split
from .wording import close_labels

ROWS = "rows.json"


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows to train on, rows to measure with, general chat, documents, and what was said of them."""

    training: tuple[Example, ...] = ()
    held_out: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    documents: tuple[Document, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)


def take_in(plan: Plan, stages: Stages) -> Taken:
    """Read and check the plan's files, once: what was taken is kept in the stage `intake`, with the rows in quarantine.

    Raises InvalidRequest where a file cannot be read, and where no row or too few are left.
    """

    def intake(folder: Path) -> dict[str, Any]:
        training, held_out, report = _examples(plan)
        general = read_examples(plan.general)
        rows = {"training": training, "held_out": held_out, "general": general}
        (folder / ROWS).write_text(json.dumps({name: to_json(part) for name, part in rows.items()}), "utf-8")
        return report

    folder, report = stages.run("intake", intake)
    rows = {name: tuple(from_json(part)) for name, part in json.loads((folder / ROWS).read_text("utf-8")).items()}
    documents, told = _documents(plan)
    return Taken(**rows, documents=documents, report=report | told)


def _examples(plan: Plan) -> tuple[Sequence[Example], Sequence[Example], dict[str, Any]]:
    """Rows to train on and to measure with: those of the test files where the plan names some, else a tenth of the examples."""
    if not plan.examples:
        return [], read_examples(plan.test, limit=plan.test_limit), {}
    read = read_examples(plan.examples, limit=plan.limit)
    test = read_examples(plan.test, limit=plan.test_limit)
    found = scan(read)
    trusted = read if plan.keep_suspects else [row for row in read if row.id not in found.suspects]
    if not trusted:
        raise InvalidRequest(
            "All examples look planted.", hint="Look at what was found; --keep-suspects trains on them all the same."
        )
    curated = curate(trusted, held_out=test)
    report = {"read": len(read), "curated": curated.report(), "planted": found.report()}
    if test:
        return curated.rows, close_labels(test, curated.rows), report
    training, held_out = split(curated.rows, test_limit=plan.test_limit, seed=plan.seed)
    return training, close_labels(held_out, training), report


def _documents(plan: Plan) -> tuple[tuple[Document, ...], dict[str, Any]]:
    """The documents without those that carry instructions, and what was said of them."""
    if not plan.docs:
        return (), {}
    documents, unread = read_documents(plan.docs)
    found = scan_texts({document.name: document.text for document in documents})
    kept = tuple(one for one in documents if plan.keep_suspects or one.name not in found.suspects)
    if not kept:
        reasons = [f"{one.what!r}: {one.why}" for one in found.findings]
        raise InvalidRequest("No document is left to learn from.", hint=" ".join([*unread, *reasons]))
    return kept, {"documents": len(kept), "unread": list(unread), "instructions": found.report()}
