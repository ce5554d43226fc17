"""What each shipped expert adds: base, the expert that the router chooses, and the right expert, on the same test rows.

    python benchmarks/experts.py --quick [--json FILE]

Base and experts are asked in the same words; rows with choices are scored by likelihood, so that a base model which does not
follow instructions is not punished for its manners. Rows are routed as they are asked, instruction and all; the accuracy of
routing the bare row, without any instruction, is printed beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import TASKS, need, parser
from peft import PeftModel

from collegium.experts.home import Home
from collegium.models.chat import ChatEncoder
from collegium.models.load import limit_threads, load_lm, load_tokenizer, pick_device, pick_dtype
from collegium.router.encoder import Encoders
from collegium.router.policies.top1 import top1
from collegium.router.policy import Live, Offer
from collegium.router.router import Router
from collegium.router.words import users_words
from collegium.schema import Lora
from collegium.settings import Settings
from collegium.training.answerer import TorchAnswerer
from collegium.training.evaluate import LOWER_IS_BETTER, Scorer, interval
from collegium.training.examples import Example, read_examples
from collegium.training.wording import ask, close_labels, wording_of

QUICK_ROWS, ROWS = 100, 200
RowScores = Mapping[str, float]


def main() -> None:
    chosen = parser(__doc__ or "").parse_args()
    data = need(chosen.data / "experts")
    with Home(Settings.load()) as home:
        figures = measure(home, data, QUICK_ROWS if chosen.quick else ROWS)
    show(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


def measure(home: Home, data: Path, limit: int) -> dict[str, Any]:
    """Figures for each task, and their macro averages."""
    experts = Experts(home)
    tasks = {}
    for domain, names in TASKS.items():
        if domain not in experts.cards:
            continue
        for name in names:
            rows = test_rows(data / domain, name, limit)
            tasks[f"{domain}/{name}"] = experts.measure(domain, rows)
            print(f"measured {domain}/{name}", flush=True)
    accuracy_like = [task for task in tasks.values() if task["metric"] not in LOWER_IS_BETTER]
    macro = {
        f"macro_{who}": round(100 * float(np.mean([task[who]["value"] for task in accuracy_like])), 2)
        for who in ("base", "routed", "oracle")
    }
    routing = round(float(np.mean([task["routing"] for task in tasks.values()])), 4)
    return {"rows_a_task": limit, "tasks": tasks, **macro, "routing_accuracy": routing}


def test_rows(folder: Path, task: str, limit: int) -> list[Example]:
    """Test rows, with the closed set of answers that the training rows show."""
    rows = read_examples([folder / f"{task}.test.jsonl.gz"], limit=limit)
    return close_labels(rows, read_examples([folder / f"{task}.train.jsonl.gz"]))


class Experts:
    """The live experts of a home on one model, and its router."""

    def __init__(self, home: Home) -> None:
        limit_threads(home.settings.threads)
        release = home.release()
        base = home.models.get(home.settings.base_model)
        self.cards = {card.domain: card for card in home.cards(release).values() if isinstance(card.spec, Lora)}
        encoders = Encoders(home.models.get(home.settings.encoder), precision=home.settings.encoder_precision)
        self.router = Router.load(home.artifacts.verify(release.router), encoders)
        experts = {card.domain: name for name, card in home.cards(release).items() if card.domain}
        offers = {domain: Offer(name, None, 1.0) for domain, name in experts.items()}
        self.live = Live(offers, Offer("base", None, 1.0), {})
        tokenizer = load_tokenizer(base)
        device = pick_device(home.settings.device)
        model: Any = load_lm(base, device=device, dtype=pick_dtype(home.settings.precision, device))
        for domain, card in self.cards.items():
            assert isinstance(card.spec, Lora)
            folder = home.artifacts.verify(card.spec.adapter)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), domain)
            else:
                model = PeftModel.from_pretrained(model, str(folder), domain).eval()
        self.model = model
        self.scorer = Scorer(TorchAnswerer(model, int(tokenizer.eos_token_id)), ChatEncoder(tokenizer))

    def score(self, rows: Sequence[Example], domain: str | None) -> dict[str, RowScores]:
        """Row id -> metrics, with the expert of `domain`, or with the base model."""
        if not rows:
            return {}
        if domain is None:
            with self.model.disable_adapter():
                scores = self.scorer.score(rows)
        else:
            self.model.set_adapter(domain)
            scores = self.scorer.score(rows)
        return {row.id: score for row, score in zip(rows, scores, strict=True)}

    def measure(self, domain: str, rows: Sequence[Example]) -> dict[str, Any]:
        """One task: base, routed and oracle, each with its 95 % interval, and where the rows were sent."""
        base, oracle = self.score(rows, None), self.score(rows, domain)
        sent = [self.send(text) for text in (ask(row) for row in rows)]
        elsewhere: dict[str, list[Example]] = defaultdict(list)
        for row, target in zip(rows, sent, strict=True):
            if target not in {None, domain}:
                elsewhere[str(target)].append(row)
        others = {target: self.score(group, target) for target, group in elsewhere.items()}
        routed = {
            row.id: base[row.id] if target is None else oracle[row.id] if target == domain else others[target][row.id]
            for row, target in zip(rows, sent, strict=True)
        }
        metric = {"likelihood": "nll"}.get(wording_of(rows[0]).metric, wording_of(rows[0]).metric)
        bare = [self.send(row.prompt) for row in rows]
        return {
            "metric": metric,
            "rows": len(rows),
            **{
                name: summary([scores[row.id][metric] for row in rows if metric in scores[row.id]])
                for name, scores in (("base", base), ("routed", routed), ("oracle", oracle))
            },
            "routing": round(float(np.mean([target == domain for target in sent])), 4),
            "routing_bare": round(float(np.mean([target == domain for target in bare])), 4),
        }

    def send(self, text: str) -> str | None:
        """The domain whose adapter would answer, None for the base model."""
        decision = top1(self.router.scores([users_words(text)])[0], self.live)
        return decision.domain if decision.reason == "routed" and decision.domain in self.cards else None


def summary(values: Sequence[float]) -> dict[str, float]:
    """The mean and its 95 % bootstrap interval."""
    low, high = interval(np.asarray(values), np.random.default_rng(0))
    return {"value": round(float(np.mean(values)), 4), "low": low, "high": high}


def show(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    print(f"\n{'task':<22}{'metric':<13}{'rows':>5}  {'base':<20}{'routed':<20}{'oracle':<20}{'routing':>8}{'bare':>7}")
    for name, task in figures["tasks"].items():
        cells = "".join(
            f"{task[who]['value']:.3f} [{task[who]['low']:.2f},{task[who]['high']:.2f}]".ljust(20)
            for who in ("base", "routed", "oracle")
        )
        print(
            f"{name:<22}{task['metric']:<13}{task['rows']:>5}  {cells}{task['routing']:>8.2f}{task['routing_bare']:>7.2f}"
        )
    print("\n" + "  ".join(f"{key} {value}" for key, value in figures.items() if key.startswith(("macro", "routing"))))


if __name__ == "__main__":
    main()
