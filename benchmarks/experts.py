"""What experts add: the base model prompted as well as it can be, one adapter for all tasks, and an expert a domain.

    python benchmarks/experts.py --multitask FOLDER [--quick] [--json FILE]

All are asked the same test rows, which no training row repeats, in the same words, as they are served; the base model may be
asked in other words and be shown solved rows before, whichever is best on training rows that are set aside. Experts are measured
twice: as the router sends the rows (routed), and with each row at the expert of its domain (oracle). The adapter for all tasks is
trained into FOLDER where it is not there: one rank-8 adapter on the same rows of all tasks, for an hour or two on a CPU.
"""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import TASKS, need, parser
from multitask import trained
from prompting import best_prompting

from collegium.experts.engine.request import Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.home import Home
from collegium.experts.kinds import Host, closing_host
from collegium.router.encoder import Encoders
from collegium.router.policies.top1 import top1
from collegium.router.policy import Live, Offer
from collegium.router.router import Router
from collegium.router.words import users_words
from collegium.schema import Lora
from collegium.settings import Settings
from collegium.training.measuring.answerer import EngineAnswerer
from collegium.training.measuring.evaluate import LOWER_IS_BETTER, Put, Scorer, as_it_is, interval
from collegium.training.measuring.gate import JUDGED_BY
from collegium.training.rows.curate import curate
from collegium.training.rows.examples import Example, read_examples
from collegium.training.rows.wording import ask, close_labels

QUICK_ROWS, ROWS = 100, 200
WHO = ("base", "multitask", "routed", "oracle")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--multitask", type=Path, help="folder of the adapter for all tasks; without it, none is compared"
    )
    options.add_argument(
        "--tasks", nargs="+", help="only these, as finance/banking77; macro averages are over them then"
    )
    chosen = options.parse_args()
    with Home(Settings.load()) as home:
        figures = measure(home, need(chosen.data / "experts"), chosen)
    show(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


def measure(home: Home, data: Path, chosen: Namespace) -> dict[str, Any]:
    """Figures for each task, and their macro averages in points of a hundred."""
    base = home.models.get(home.settings.base_model)
    multitask = trained(home, base, data, chosen.multitask) if chosen.multitask else None
    tasks = {}
    with closing_host(home, base) as host:
        bench = Bench(home, host, multitask)
        for domain, names in TASKS.items():
            for name in (name for name in names if not chosen.tasks or f"{domain}/{name}" in chosen.tasks):
                training, rows = test_rows(data / domain, name, QUICK_ROWS if chosen.quick else ROWS)
                tasks[f"{domain}/{name}"] = task = bench.measure(domain, rows, training)
                shown = "  ".join(f"{who} {task[who]['value']:.3f}" for who in WHO if who in task)
                print(f"{domain}/{name}: {shown}", flush=True)
    counted = [task for task in tasks.values() if task["metric"] not in LOWER_IS_BETTER]

    def macro(key: str) -> float:
        return round(100 * float(np.mean([task[key]["value"] for task in counted])), 2)

    figures = {f"macro_{who}": macro(who) for who in WHO if who in counted[0]}
    routing = round(float(np.mean([task["routing"] for task in tasks.values()])), 4)
    return {
        **figures,
        "gap_at_oracle": round(figures["macro_oracle"] - figures["macro_routed"], 2),
        "expert_error": round(100 - figures["macro_oracle"], 2),
        "routing_accuracy": routing,
        "tasks": tasks,
    }


def test_rows(folder: Path, task: str, limit: int) -> tuple[list[Example], list[Example]]:
    """All training rows, and test rows that none of them repeats, with the closed set of answers that the training rows show."""
    training = read_examples([folder / f"{task}.train.jsonl.gz"])
    test = read_examples([folder / f"{task}.test.jsonl.gz"])
    seen = {one.of for one in curate(training, held_out=test).dropped if one.why == "held_out"}
    unseen = [row for row in test if row.id not in seen]
    return training, close_labels(random.Random(len(unseen)).sample(unseen, min(limit, len(unseen))), training)


class Bench:
    """The live experts of a home in one engine, and its router."""

    def __init__(self, home: Home, host: Host, multitask: Path | None) -> None:
        release = home.release()
        cards = home.cards(release)
        self.host = host
        self.multitask = Adapter("multitask", multitask) if multitask else None
        self.adapters = {
            card.domain: Adapter(card.spec.adapter, home.artifacts.verify(card.spec.adapter))
            for card in cards.values()
            if isinstance(card.spec, Lora) and card.domain
        }
        encoders = Encoders(home.models.get(home.settings.encoder), precision=home.settings.encoder_precision)
        self.router = Router.load(home.artifacts.verify(release.router), encoders)
        offers = {card.domain: Offer(name, None, 1.0) for name, card in cards.items() if card.domain}
        self.live = Live(offers, Offer("base", None, 1.0), {})

    def measure(self, domain: str, rows: Sequence[Example], training: Sequence[Example]) -> dict[str, Any]:
        """One task: who reaches what, with 95 % intervals, and where the rows were sent."""
        prompting = best_prompting(training, self.scores)
        plain = self.scores(rows, None)
        base = self.scores(*prompting.of(rows)) if prompting.changes else plain
        oracle = self.scores(rows, self.adapters[domain]) if domain in self.adapters else plain
        sent = [self.send(ask(row)) for row in rows]
        routed = list(oracle)
        for target in {*sent} - {domain if domain in self.adapters else None}:
            places = [at for at, where in enumerate(sent) if where == target]
            adapter = self.adapters[target] if target else None
            found = self.scores([rows[at] for at in places], adapter)
            for at, score in zip(places, found, strict=True):
                routed[at] = score
        metric = next(name for names in JUDGED_BY for name in names if name in oracle[0])
        who = {"base": base, "routed": routed, "oracle": oracle}
        if self.multitask:
            who["multitask"] = self.scores(rows, self.multitask)
        wanted = domain if domain in self.adapters else None
        return {
            "metric": metric,
            "rows": len(rows),
            **{name: summary(scores, metric) for name, scores in who.items()},
            "base_prompting": str(prompting),
            "base_as_asked": summary(plain, metric),
            "exact_match": {
                name: summary(scores, "exact_match")["value"]
                for name, scores in who.items()
                if "exact_match" in scores[0]
            },
            "routing": round(float(np.mean([target == wanted for target in sent])), 4),
            "routing_bare": round(float(np.mean([self.send(row.prompt) == wanted for row in rows])), 4),
        }

    def scores(
        self, rows: Sequence[Example], adapter: Adapter | None = None, put: Put = as_it_is
    ) -> list[Mapping[str, float]]:
        """The metrics of each row, answered with an adapter or by the base model."""
        answerer = EngineAnswerer(self.host.engine, lambda prompt: (Row(prompt, adapter),))
        return Scorer(answerer, self.host.chat, put=put).score(rows)

    def send(self, text: str) -> str | None:
        """The domain whose adapter would answer, None for the base model."""
        decision = top1(self.router.scores([users_words(text)])[0], self.live)
        return decision.domain if decision.reason == "routed" and decision.domain in self.adapters else None


def summary(scores: Sequence[Mapping[str, float]], metric: str) -> dict[str, float]:
    """The mean and its 95 % bootstrap interval; an answer that is too long to be said has another metric, and does not count."""
    values = [score[metric] for score in scores if metric in score]
    low, high = interval(np.asarray(values), np.random.default_rng(0))
    return {"value": round(float(np.mean(values)), 4), "low": low, "high": high}


def show(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    who = [one for one in WHO if f"macro_{one}" in figures]
    heads = "".join(one.ljust(20) for one in who)
    print(f"\n{'task':<23}{'metric':<10}{'rows':>5}  {heads}{'routing':>8}{'bare':>7}  base prompted")
    for name, task in figures["tasks"].items():
        cells = "".join(
            f"{task[one]['value']:.3f} [{task[one]['low']:.2f},{task[one]['high']:.2f}]".ljust(20) for one in who
        )
        routing = f"{task['routing']:>8.2f}{task['routing_bare']:>7.2f}"
        print(f"{name:<23}{task['metric']:<10}{task['rows']:>5}  {cells}{routing}  {task['base_prompting']}")
    print("\n" + "  ".join(f"{key} {value}" for key, value in figures.items() if key != "tasks"))


if __name__ == "__main__":
    main()
