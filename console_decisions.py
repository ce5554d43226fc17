"""What the command line shows of the decision log."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from .console import out
from .endpoint.wire import decision_to_dict

if TYPE_CHECKING:
    from .experts.decisions import Stored
    from .router.replay import Replay

NOTHING = "-"


def show_decisions(decisions: Sequence[Stored], *, as_json: bool) -> None:
    """The log, newest first: a table, or one JSON object a line."""
    if as_json:
        for one in decisions:
            sys.stdout.write(json.dumps(_to_dict(one)) + "\n")
        return
    if not decisions:
        out.print("No decision is in the log.")
        return
    table = Table(*(Column(name, no_wrap=True) for name in ("when (UTC)", "domain", "expert", "why")), **PLAIN)
    table.add_column("confidence", justify="right", no_wrap=True)
    table.add_column("prompt", min_width=len(_hash(decisions[0])))
    for one in decisions:
        decision = one.decision
        table.add_row(
            one.created.strftime("%Y-%m-%d %H:%M:%S"),
            escape(decision.domain or NOTHING),
            escape(decision.expert),
            decision.reason,
            f"{decision.confidence:.2f}",
            Text(_hash(one) if one.text is None else one_line(one.text), no_wrap=True, overflow="ellipsis"),
        )
    out.print(table)


def show_replay(result: Replay, *, router: str, as_json: bool) -> None:
    """How another router's verdicts differ."""
    replayed = result.same + sum(result.changes.values())
    if as_json:
        body = {
            "router": router,
            "replayed": replayed,
            "same": result.same,
            "changes": [{"from": old, "to": new, "count": count} for (old, new), count in result.changes.items()],
            "other_encoders": dict(result.elsewhere),
        }
        sys.stdout.write(json.dumps(body) + "\n")
        return
    out.print(f"Router {router}: {result.same} of {replayed} decisions would be the same.")
    if result.changes:
        table = Table("from", "to", "decisions", **PLAIN)
        for (old, new), count in result.changes.items():
            table.add_row(escape(old or NOTHING), escape(new or NOTHING), str(count))
        out.print(table)
    for encoder, count in result.elsewhere.items():
        out.print(f"Not replayed, because they rest on another encoder ({escape(encoder)}): {count}.")


PLAIN: dict[str, Any] = {"box": None, "header_style": "bold", "pad_edge": False}


def _to_dict(stored: Stored) -> dict[str, Any]:
    return {
        "created": stored.created.isoformat(timespec="milliseconds"),
        "release": stored.release,
        "encoder": stored.encoder,
        "prompt_hash": stored.prompt_hash,
        "text": stored.text,
        "domains": stored.domains,
        **decision_to_dict(stored.decision),
    }


def _hash(stored: Stored) -> str:
    return f"#{stored.prompt_hash[:12]}"


def one_line(text: str) -> str:
    """A terminal must not obey what somebody sent, and a table has one line for it."""
    return "".join(character if character.isprintable() else " " for character in text)
