"""What a training said, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from .console import show_card
from .experts.home import Home
from .schema import JobState, card_from_dict
from .training.rows.curate import summary


def show_outcome(job: JobState, home: Home) -> None:
    """How a job of training ended: what became of its rows, what was measured, and who is live."""
    for sentence in sentences(job.report):
        typer.echo(sentence)
    if measured := job.report.get("card"):  # of one that was refused
        show_card(card_from_dict(measured))
    if job.state != "done":
        return
    card = home.registry.card(job.report["live"])
    show_card(card)
    typer.echo(f"{card.version} is live. {job.report.get('refused') or 'Gate: ' + job.report['gate'] + '.'}")


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """What became of rows and documents."""
    if curated := report.get("curated"):
        yield from summary(curated)
    for where in ("planted", "instructions"):
        for finding in report.get(where, {}).get("findings", ()):
            yield f"Suspect, {finding['rows']} set aside: {finding['what']!r}. {finding['why']}"
    yield from report.get("unread", ())
    if found := report.get("from_documents"):
        yield f"{found['kept']} question-answer pairs were made of {report['documents']} documents."
