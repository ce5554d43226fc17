"""What the command line shows of the router: why it scores a prompt as it does, and what it was fitted on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .console import BAR, WHY, out
from .console_decisions import PLAIN, one_line
from .endpoint.wire import decision_to_dict
from .router.rows import BACKGROUND

if TYPE_CHECKING:
    from .router.artifact import RouterArtifact
    from .router.explain import Explanation, Neighbour
    from .schema import Decision

ALWAYS, MOST, LEAST = 3, 5, 0.01
"""Domains that are shown: the likeliest ones whatever they have, and of some more those with a probability worth a line."""
EXCERPT = 100
"""Characters of a stored prompt that a line has room for."""
VIEWS = {"logit": "largest logit", "cosine": "cosine of the nearest", "agreement": "neighbours' agreement"}
"""The views of familiarity, in the order of `Explanation.views`."""
NO_DOMAIN = "of no domain"


def show_explanation(found: Explanation, decision: Decision, *, prompt: str, as_json: bool) -> None:
    """Who would answer, and what speaks for each domain.

    JSON is ASCII: what a stored prompt holds must not reach a terminal.
    """
    if as_json:
        sys.stdout.write(json.dumps(_to_dict(found, decision, prompt)) + "\n")
        return
    possible = " or ".join(_plain(domain) for domain in found.scores.prediction_set)
    out.print(_plain(prompt))
    out.print(f"{_plain(decision.expert)} · {WHY[decision.reason]}")
    out.print(f"  {possible}, {_percent(found.coverage)}")
    out.print(
        f"  more familiar than {_percent(found.scores.confidence)} of known prompts; "
        f"fewer than {_percent(found.scores.threshold)} would fit no domain"
    )
    views = zip(VIEWS.values(), found.views, found.typical, strict=True)
    out.print("  " + "; ".join(f"{name} {value:.2f}, typically {typical:.2f}" for name, value, typical in views))
    for domain in _worth_a_line(found):
        p = found.scores.probabilities[domain]
        colour = "green" if domain in found.scores.prediction_set else "dim"
        out.print(f"  [bold]{_plain(domain):<12}[/] [{colour}]{'█' * round(p * BAR):<{BAR}}[/] {p:.2f}")
        _show_neighbours(found.nearest.get(domain, ()))
    if background := found.nearest.get(BACKGROUND):
        out.print(f"  [bold]{NO_DOMAIN}[/]")
        _show_neighbours(background)


def show_router(artifact: RouterArtifact, version: str, *, as_json: bool) -> None:
    """What a router was fitted on, and what was measured of it."""
    counts = Counter(zip(artifact.rows.domains, artifact.rows.sources, strict=True))
    accuracy = artifact.provenance.get("accuracy", {})
    if as_json:
        sys.stdout.write(json.dumps(_router_to_dict(artifact, version, counts), indent=1) + "\n")
        return
    tuned = " with an adapter" if artifact.adapter else ""
    out.print(f"[bold]{_plain(version)}[/] · encoder {_plain(artifact.encoder)}{tuned}")
    out.print(
        f"threshold {artifact.threshold:g}: what is less familiar than {_percent(1 - artifact.threshold)} "
        "of known prompts fits no domain"
    )
    out.print(f"prediction sets hold the right domain of {_percent(artifact.head.coverage)} of prompts")
    out.print(f"temperature {artifact.head.temperature:.2f}")
    table = Table("domain", "source", **PLAIN)
    table.add_column("stored prompts", justify="right")
    for (domain, source), count in sorted(counts.items(), key=lambda one: (one[0][0] == BACKGROUND, one[0])):
        table.add_row(_plain(domain) if domain != BACKGROUND else NO_DOMAIN, _plain(source), str(count))
    out.print(table)
    if accuracy:
        table = Table("held-out source", **PLAIN)
        table.add_column("accuracy", justify="right")
        for source, share in accuracy.items():
            table.add_row(_plain(source), f"{share:.3f}")
        out.print(table)


def _worth_a_line(found: Explanation) -> Iterator[str]:
    chances = found.scores.probabilities
    for rank, domain in enumerate(sorted(chances, key=lambda domain: -chances[domain])[:MOST]):
        if rank < ALWAYS or chances[domain] >= LEAST:
            yield domain


def _show_neighbours(neighbours: Sequence[Neighbour]) -> None:
    for one in neighbours:
        text = f'  "{escape(shorten(one_line(one.text), EXCERPT, placeholder=" …"))}"' if one.text else ""
        out.print(f"    [dim]{one.cosine:.2f}  {_plain(one.source)}  {_plain(one.id)}[/]{text}")


def _to_dict(found: Explanation, decision: Decision, prompt: str) -> dict[str, Any]:
    """A decision with its reasons; `background` are the nearest prompts of no domain."""
    nearest = {domain: [_neighbour_to_dict(one) for one in near] for domain, near in found.nearest.items()}
    return {
        "prompt": prompt,
        **decision_to_dict(decision),
        "coverage": found.coverage,
        "views": {
            name: {"value": round(value, 4), "typical": round(typical, 4)}
            for name, value, typical in zip(VIEWS, found.views, found.typical, strict=True)
        },
        "background": nearest.pop(BACKGROUND, []),
        "nearest": nearest,
    }


def _neighbour_to_dict(one: Neighbour) -> dict[str, Any]:
    return {"source": one.source, "id": one.id, "cosine": round(one.cosine, 4), "text": one.text}


def _router_to_dict(artifact: RouterArtifact, version: str, counts: Counter[tuple[str, str]]) -> dict[str, Any]:
    """`rows` of the domain null are of none."""
    return {
        "version": version,
        "encoder": artifact.encoder,
        "adapter": artifact.adapter is not None,
        "threshold": artifact.threshold,
        **artifact.head.to_dict(),
        "rows": [
            {"domain": domain or None, "source": source, "rows": count}
            for (domain, source), count in sorted(counts.items())
        ],
        "provenance": artifact.provenance,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _plain(text: str) -> str:
    """A terminal must not obey what is stored, nor rich read it as markup."""
    return escape(one_line(text))
