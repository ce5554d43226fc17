"""A black box steered by a small expert, beside everybody it could be replaced by, on the same rows.

    python benchmarks/proxy.py --work DIR [--quick] [--json FILE] [--sections quality speed remote]

For each task an adapter of the small model and one of the large are trained alike (`--work` keeps them: the second run trains
nothing), combinations are fitted on rows held out of the training file, and all are measured on test rows, in the engine, as they
serve. `nll_gap_closed` is the part of the way from the large model to the directly tuned one that steering goes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import need, parser
from proxy_adapters import TASKS, Rows, adapter, read_rows
from proxy_remote import call_figures, tail_error
from proxy_speed import speed_figures

from collegium.console import progress_bars
from collegium.experts.combination import formula
from collegium.experts.engine.request import BASE, Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.home import Home
from collegium.experts.kinds import Host, open_host
from collegium.models.encoder import Encoder
from collegium.schema import Combination
from collegium.settings import Settings
from collegium.training.measuring.answerer import EngineAnswerer
from collegium.training.measuring.evaluate import SAID_TOKENS, Scorer, answer_of, interval, prompt_of
from collegium.training.measuring.similarity import sem_scores
from collegium.training.proxies.fit_combination import Fitted, fit
from collegium.training.proxies.record_answers import record
from collegium.training.recipes import Progress

SECTIONS = ("quality", "speed", "remote")
OTHERS = "medquad"
"""The task that speed, and the error of top k, are measured on."""
QUICK_ROWS, ROWS = 20, 100
METHODS = {"proxy": "proxy", "mix": "mixture", "comb": "comblm"}
"""Name of a figure -> method."""


@dataclass(frozen=True, slots=True)
class Contest:
    """A task's adapters in one engine with the large and the small model."""

    host: Host
    small: str
    tuned: Adapter
    direct: Adapter

    def rows(self, parts: Sequence[str]) -> Callable[[Sequence[int]], tuple[Row, ...]]:
        """A function from a prompt to rows."""
        who = {
            "large": (None, BASE),
            "untuned": (None, self.small),
            "tuned": (self.tuned, self.small),
            "direct": (self.direct, BASE),
        }
        return lambda prompt: tuple(Row(prompt, *who[part]) for part in parts)

    def alone(self, part: str) -> EngineAnswerer:
        """One model by itself."""
        return EngineAnswerer(self.host.engine, self.rows([part]))

    def together(self, combination: Combination) -> EngineAnswerer:
        """What a card with this combination would be."""
        return EngineAnswerer(
            self.host.engine, self.rows(formula(combination).parts), lambda: formula(combination).combiner
        )


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "collegium-proxy")
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    options.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of the sections quality and remote"
    )
    chosen = options.parse_args()
    data = need(chosen.data / "experts")
    figures: dict[str, Any] = {}
    if chosen.json and chosen.json.exists():  # sections that are not run keep what they had
        figures = json.loads(chosen.json.read_text("utf-8"))
    with Home(Settings.load()) as home, progress_bars(quiet=False) as progress:
        base = home.models.get(home.settings.base_model, progress)
        host = open_host(home, base)
        try:
            for task in chosen.tasks if "quality" in chosen.sections else ():
                rows = read_rows(data, task, QUICK_ROWS if chosen.quick else ROWS)
                contest = prepare(host, task, rows, chosen.work, progress)
                figures |= quality(contest, task, rows, Encoder(home.models.get(home.settings.encoder)))
                _write(chosen.json, figures)
            for task in chosen.tasks if "remote" in chosen.sections else ():
                rows = read_rows(data, task, ROWS)
                figures |= call_figures(task, prepare(host, task, rows, chosen.work, progress), base, rows)
                _write(chosen.json, figures)
            rows = read_rows(data, OTHERS, ROWS)
            if "remote" in chosen.sections:
                figures |= tail_error(prepare(host, OTHERS, rows, chosen.work, progress), rows.test)
            if "speed" in chosen.sections:
                figures |= speed_figures(prepare(host, OTHERS, rows, chosen.work, progress), rows.test)
            _write(chosen.json, figures)
        finally:
            host.engine.close()
    show(figures)


def prepare(host: Host, task: str, rows: Rows, work: Path, progress: Progress) -> Contest:
    """Train what is not trained yet, and load it."""
    small = host.settings.small_model
    folders = {}
    for size, name in (("small", small), ("large", BASE)):
        model = host.models.cached(name)
        folder = work / f"{task}-{size}"
        folders[size] = adapter(task, rows, model, folder, host.settings, progress)
    tuned, direct = (Adapter(str(folders[size]), folders[size]) for size in ("small", "large"))
    return Contest(host, host.models.open(small).name, tuned, direct)


def quality(contest: Contest, task: str, rows: Rows, encoder: Encoder) -> dict[str, Any]:
    """NLL, perplexity and the task's score of each contestant."""
    host, chat = contest.host, contest.host.chat
    dev = [(prompt_of(row, chat), [answer_of(row, chat)]) for row in rows.dev]
    fitted = fit(record(host.engine, contest.rows(("large", "tuned", "untuned")), dev))
    contestants = {
        "large": contest.alone("large"),
        "untuned": contest.alone("untuned"),
        "expert": contest.alone("tuned"),
        "direct": contest.alone("direct"),
        **{name: contest.together(fitted.combinations[method]) for name, method in METHODS.items()},
    }
    nll = {name: nlls(Scorer(one, chat), rows) for name, one in contestants.items()}
    scores = {name: score(Scorer(one, chat), rows, encoder) for name, one in contestants.items()}
    return _figures(task, fitted, nll, scores)


def nlls(scorer: Scorer, rows: Rows) -> list[float]:
    """Negative log-likelihood a token of each test answer, in nats."""
    questions = [(prompt_of(row, scorer.chat), [answer_of(row, scorer.chat)]) for row in rows.test]
    return [-float(np.mean(found[0])) for found in scorer.answerer.logprobs(questions)]


def score(scorer: Scorer, rows: Rows, encoder: Encoder) -> dict[str, list[float]]:
    """The task's own metrics, a value a row; SemScore where answers are long."""
    results = scorer.score(rows.test)
    if "nll" not in results[0]:
        return {metric: [result[metric] for result in results] for metric in results[0]}
    answers = scorer.answerer.generate([prompt_of(row, scorer.chat) for row in rows.test], SAID_TOKENS)
    said = [scorer.chat.decode(answer) for answer in answers]
    return {"semscore": sem_scores(said, [row.answer for row in rows.test], encoder.encode)}


def _figures(
    task: str, fitted: Fitted, nll: Mapping[str, list[float]], scores: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    means = {name: float(np.mean(values)) for name, values in nll.items()}
    figures: dict[str, Any] = {f"{task}_{name}_nll": round(mean, 4) for name, mean in means.items()}
    figures |= {f"{task}_{name}_nll_interval": interval(np.asarray(values), rng) for name, values in nll.items()}
    figures |= {f"{task}_{name}_ppl": round(float(np.exp(mean)), 3) for name, mean in means.items()}
    gap = (means["large"] - means["proxy"]) / (means["large"] - means["direct"])
    figures[f"{task}_nll_gap_closed"] = round(gap, 4)
    figures[f"{task}_alpha"] = fitted.combinations["proxy"].alpha
    figures[f"{task}_dev_nll"] = dict(fitted.nll)
    for name, metrics in scores.items():
        for metric, values in metrics.items():
            figures[f"{task}_{name}_{metric}"] = round(float(np.mean(values)), 4)
    figures[f"{task}_rows"] = len(nll["large"])
    return figures


def show(figures: Mapping[str, Any]) -> None:
    """A table a task, and the rest as it is."""
    names = ["large", "untuned", "expert", "proxy", "mix", "comb", "direct"]
    for task in TASKS:
        if f"{task}_large_nll" not in figures:
            continue
        print(f"\n{task}: {figures[f'{task}_rows']} rows, alpha {figures[f'{task}_alpha']}")
        print(f"  {'':12}" + "".join(f"{name:>10}" for name in names))
        metrics = [key.removeprefix(f"{task}_large_") for key in figures if key.startswith(f"{task}_large_")]
        for metric in [one for one in metrics if not one.endswith("interval")]:
            print(f"  {metric:12}" + "".join(f"{figures[f'{task}_{name}_{metric}']:10.3f}" for name in names))
        print(f"  nll_gap_closed {figures[f'{task}_nll_gap_closed']:.3f}")
    for key, value in figures.items():
        if not key.startswith(tuple(TASKS)):
            print(f"{key:40} {value}")


def _write(path: Path | None, figures: Mapping[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=1), "utf-8")


if __name__ == "__main__":
    main()
