"""What the command line shows: answers, decisions, cards, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .endpoint.wire import decision_to_dict, reply_to_dict, usage_to_dict
from .errors import CollegiumError
from .schema import Card, Combination, Decision, Message, Proxy, Remote, Score, card_to_dict

if TYPE_CHECKING:
    from .models.fetch import Progress
    from .runtime import Answer, Collegium

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

WHY = {
    "routed": "the router chose it",
    "unknown_domain": "no domain fits, so the fallback answers",
    "no_expert": "the domain has no expert yet, so the fallback answers",
    "explicit": "asked for by name",
    "sticky": "the conversation stays with it",
    "cheaper": "the domain's expert is not worth its cost, so the fallback answers",
    "degraded": "the chosen expert cannot serve, so the fallback answers",
}
BAR = 20


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Progress]:
    """Hand out `report(what, done, total)`; total 0 means that nobody knows."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    if quiet or not err.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err, transient=True) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


def show_answer(answer: Answer, *, as_json: bool = False) -> None:
    """Stream an answer, then say who gave it, why, and from what."""
    for delta in answer:
        if not as_json:
            sys.stdout.write(delta.text)  # as it is: no markup, no wrapping
            sys.stdout.flush()
    reply = answer.reply
    if as_json:
        body = {
            "text": reply.text,
            **reply_to_dict(reply),
            "usage": usage_to_dict(reply),
            "finish_reason": reply.finish_reason,
        }
        sys.stdout.write(json.dumps(body, ensure_ascii=False) + "\n")
        return
    out.print("\n")
    out.print(f"[bold]{reply.expert_version}[/] · {WHY[reply.decision.reason]} · {_speed(answer)}")
    if paid := reply.paid:
        drafted = f", {paid.accepted} of {paid.drafted} drafted tokens accepted" if paid.drafted else ""
        spent = f"{paid.calls} calls, {paid.prompt_tokens} tokens sent, {paid.completion_tokens} received"
        out.print(f"[dim]the remote server ({reply.mode}): {spent}{drafted}[/]")
    _show_bars(reply.decision)
    for number, passage in enumerate(reply.citations, 1):
        place = f"{passage.document}, characters {passage.span[0]}-{passage.span[1]}"
        out.print(f"[dim][{number}] {escape(place)}, score {passage.score:.2f}[/]")


def converse(collegium: Collegium, ask: Mapping[str, Any], *, first: str | None = None) -> None:
    """A conversation on a terminal, after a `first` prompt if there is one; an empty line or Ctrl-D ends it."""
    history: list[Message] = []
    if first is None:
        out.print("[dim]Ask anything. An empty line ends the conversation.[/]")
    else:
        out.print(f"[bold cyan]> [/]{escape(first)}")
    while text := _next_turn() if first is None else first:
        first = None
        history.append(Message("user", text))
        try:
            answer = collegium.stream(history, **ask)
            show_answer(answer)
        except CollegiumError as error:
            err.print(f"[red]{escape(str(error))}[/]")
            history.pop()
            continue
        history.append(Message("assistant", answer.reply.text))


def _next_turn() -> str:
    try:
        return out.input("\n[bold cyan]> [/]").strip()
    except EOFError:
        return ""


def show_decision(decision: Decision, *, prompt: str, as_json: bool) -> None:
    """One decision, as bars or as a line of JSON."""
    if as_json:
        sys.stdout.write(json.dumps({"prompt": prompt, **decision_to_dict(decision)}, ensure_ascii=False) + "\n")
        return
    sys.stdout.write(f"{prompt}\n")
    sys.stdout.flush()
    out.print(f"{decision.expert} · {WHY[decision.reason]}")
    _show_bars(decision)


def show_cards(cards: Mapping[str, Card], *, as_json: bool) -> None:
    """The live experts as a table."""
    if as_json:
        sys.stdout.write(json.dumps({name: card_to_dict(card) for name, card in cards.items()}, indent=1) + "\n")
        return
    table = Table("expert", "kind", "domain", "measured against base", "description", box=None, header_style="bold")
    for _, card in sorted(cards.items()):
        scores = ", ".join(f"{score.task} {score.value:.2f} ({score.base:.2f})" for score in card.evidence.scores[:3])
        table.add_row(card.version, card.spec.kind, card.domain, scores, escape(card.evidence.description))
    out.print(table)


def show_card(card: Card, *, as_json: bool = False) -> None:
    """One card with every score."""
    if as_json:
        sys.stdout.write(json.dumps(card_to_dict(card), indent=1) + "\n")
        return
    out.print(f"[bold]{card.version}[/] · {card.spec.kind} · domain {card.domain or '-'} · base {card.base}")
    if card.evidence.description:
        out.print(escape(card.evidence.description))
    if card.evidence.gate:
        out.print(f"gate: {card.evidence.gate}{' (forced)' if card.evidence.forced else ''}")
    if isinstance(card.spec, Proxy | Remote):
        out.print(f"combination: {_combined(card.spec.combination)}")
    if card.evidence.capabilities:
        able = ", ".join(
            f"{name} {value}" for name, value in card.evidence.capabilities.items() if value not in (False, 0)
        )
        out.print(f"the server: {escape(able or 'text only')}")
    if card.evidence.scores:
        out.print(_scores(card.evidence.scores))


def _combined(combination: Combination) -> str:
    """The method and what was fitted of it."""
    match combination.method:
        case "comblm":
            steered = f" and a large model steered with alpha {combination.alpha:.2f}" if combination.alpha else ""
            return f"comblm, learned weights of the small expert{steered or ' and the large model'}"
        case "mixture":
            return f"mixture, {combination.alpha:.2f} of it the small expert's"
    fading = f", going to {combination.alpha_end:.2f} over {combination.fade} tokens" if combination.fade else ""
    return f"{combination.method}, alpha {combination.alpha:.2f}{fading}"


def _scores(scores: Sequence[Score]) -> Table:
    """A row a score, with a column for each of those that stand beside."""
    others = list(dict.fromkeys(who for score in scores for who in score.beside))
    columns = ("task", "metric", "expert", "95 % interval", "base", *others, "rows")
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == "95 % interval")
    for score in scores:
        beside = [f"{score.beside[who]:.3f}" if who in score.beside else "" for who in others]
        interval = f"{score.low:.3f} to {score.high:.3f}"
        numbers = (f"{score.value:.3f}", interval, f"{score.base:.3f}", *beside, str(score.rows))
        table.add_row(score.task, score.metric, *numbers)
    return table


def _show_bars(decision: Decision) -> None:
    best = max(decision.probabilities, key=decision.probabilities.__getitem__)
    for domain, p in sorted(decision.probabilities.items(), key=lambda item: -item[1])[:4]:
        colour = "green" if domain == best and decision.confidence >= decision.threshold else "dim"
        out.print(f"  {escape(domain):<12} [{colour}]{'█' * round(p * BAR):<{BAR}}[/] {p:.2f}")


def _speed(answer: Answer) -> str:
    timings, tokens = answer.timings, answer.reply.usage.completion_tokens
    first, total = timings.get("first_token", 0.0), timings.get("total", 0.0)
    rate = (tokens - 1) / (total - first) if tokens > 1 and total > first else 0.0
    return f"first token {first:.2f} s, {rate:.0f} tokens/s"
