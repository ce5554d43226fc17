"""What the command line shows of experts' versions: what was checked, and what differs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from .console import out
from .experts.differences import DeltaChange, Difference, ModuleChange
from .schema import Card, Score, card_to_dict
from .training.verify import Checked

CHECKS = ("card", "files", "tensors", "canary")
TOP = 10
"""Modules that are shown."""
SHOWN = 12
"""Digits of a hash."""
HEX = 64


def show_checked(checked: Sequence[Checked], *, as_json: bool) -> None:
    """A row an artifact with what was checked of it; `-` where there is nothing to check, or an earlier check failed."""
    if as_json:
        body = [
            {"name": one.name, "kind": one.kind, "checks": {check.what: not check.problem for check in one.checks}}
            | {"problem": one.problem or None}
            for one in checked
        ]
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    table = _table("artifact", "kind", *CHECKS)
    for one in checked:
        found = {check.what: "[red]wrong[/]" if check.problem else "ok" for check in one.checks}
        table.add_row(escape(one.name), one.kind, *(found.get(what, "-") for what in CHECKS))
    out.print(table)


def show_difference(found: Difference, *, as_json: bool) -> None:
    """The cards' fields, their scores, and how much the adapters differ; `*` marks a field that does."""
    if as_json:
        sys.stdout.write(json.dumps(_difference_to_dict(found), indent=1) + "\n")
        return
    one, other = found.cards
    table = _table("", "", f"A: {escape(one.version)}", f"B: {escape(other.version)}")
    for name, first, second in found.facts():
        table.add_row("" if first == second else "*", escape(name), *(escape(_short(each)) for each in (first, second)))
    out.print(table)
    if one.evidence.scores or other.evidence.scores:
        out.print("\n[bold]scores[/]")
        out.print(_scores(one, other))
    out.print("\n[bold]adapters[/]")
    if found.deltas is None:
        out.print(f"Nothing to compare: {found.why}.")
    else:
        _show_deltas(found.deltas)


def _show_deltas(deltas: DeltaChange) -> None:
    cosine = "" if deltas.cosine is None else f"; cosine similarity of what they add {deltas.cosine:.4f}"
    out.print(f"The change is {_share(deltas.change)} of {deltas.against}{cosine}.")
    table = _table("module", "change", "cosine")
    for row in deltas.modules[:TOP]:
        table.add_row(row.module, _share(row.change), "-" if row.cosine is None else f"{row.cosine:.4f}")
    out.print(table)


def _scores(one: Card, other: Card) -> Table:
    table = _table("task", "metric", "A", "its base", "B", "its base")
    both = [{(score.task, score.metric): score for score in card.evidence.scores} for card in (one, other)]
    for key in sorted({*both[0], *both[1]}):
        table.add_row(*key, *(cell for scores in both for cell in _cells(scores.get(key))))
    return table


def _cells(score: Score | None) -> tuple[str, str]:
    return (f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})", f"{score.base:.3f}") if score else ("-", "-")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _short(text: str) -> str:
    return text[:SHOWN] if len(text) == HEX and " " not in text else text


def _share(change: float) -> str:
    return f"{change:.4f}" if math.isfinite(change) else "all new"


def _difference_to_dict(found: Difference) -> dict[str, Any]:
    deltas = found.deltas and {
        "change": _finite(found.deltas.change),
        "cosine": found.deltas.cosine,
        "against": found.deltas.against,
        "modules": [_module_to_dict(row) for row in found.deltas.modules],
    }
    cards = [{"version": card.version, **card_to_dict(card)} for card in found.cards]
    return {"cards": cards, "sizes": found.sizes, "deltas": deltas, "why": found.why}


def _module_to_dict(row: ModuleChange) -> dict[str, Any]:
    return {"module": row.module, "change": _finite(row.change), "cosine": row.cosine}


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None
