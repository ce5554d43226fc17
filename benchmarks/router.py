"""The router on prompts of authors that it never saw: accuracy, calibration, open set, speed; peers and published protocols.

    python benchmarks/router.py [--quick] [--json FILE] [--report docs/router] [--peers PYTHON] [--only SECTION ...]

The headline `dev_mean` is the mean over held-out sources of the live router. A random split of the training sources would
measure how well a data set's style is recognised, not its domain. --peers names an interpreter with semantic-router and SetFit
(router_peers.py says how to make one). --report writes the sheet: Markdown, JSON and pictures. All sections take about 45
minutes on two cores; --quick runs those that fit nothing. What FILE has of sections that are not run is kept, with the
command that measured it. `dev_mean` is a development figure: what the router does was chosen by these held-out sources.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from data import need, parser
from router_fits import STEPS, Task, banking, clinc, linear, step, without
from router_latency import latency
from router_peers import open_peers

from collegium.experts.home import Home
from collegium.models.load import cores
from collegium.router.artifact import RouterArtifact
from collegium.router.build import LabelledPrompt, embed, read_pair, some_of_each_source
from collegium.router.encoder import Encoders
from collegium.router.fit import calibrate, right_by_source
from collegium.router.head import Floats
from collegium.router.policy import Scores
from collegium.router.router import Router
from collegium.router.rows import Rows
from collegium.settings import Settings
from collegium.training.routing.augment import typos

SECTIONS = ("latency", "live", "peers", "lodo", "intents", "steps")
PEER_ROWS = 300
"""Rows of each source that peers learn from, our own prompts among them."""
BINS = 15
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""What a numeric library reads once, when it is loaded: a process has it from its start or not at all."""


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--peers", help="a Python with semantic-router and SetFit")
    options.add_argument("--report", type=Path, help="folder to write the sheet into")
    options.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options.add_argument("--share", type=float, default=1.0, help="of the steps that fits take, for a trial")
    chosen = options.parse_args()
    wanted = {"latency", "live"} if chosen.quick else set(chosen.only)
    train, dev = read_pair(
        need(chosen.data / "router") / "domains.train.jsonl.gz", chosen.data / "router" / "domains.dev.jsonl.gz"
    )
    figures: dict[str, Any] = {}
    if chosen.json and chosen.json.exists():
        figures |= json.loads(chosen.json.read_text("utf-8"))
    figures["cores"] = cores()
    figures["command"] = {**figures.get("command", {}), **dict.fromkeys(wanted, command(sys.argv))}
    with Home(Settings.load()) as home:
        model = home.models.get(home.settings.encoder)
        encoders = Encoders(model, precision=home.settings.encoder_precision)
        release = home.release()
        router = Router.load(home.artifacts.verify(release.router), encoders, release.router[:12])
        figures["router"] = router.version
        if "latency" in wanted:
            tell(figures, latency(router, model.folder))
        if "live" in wanted:
            tell(figures, live(router, encoders, Encoders(model, precision="float32"), dev))
        if "peers" in wanted:
            tell(figures, {"peers": peers(model.folder, chosen.peers, train, dev)})
        if wanted & {"lodo", "intents", "steps"}:
            domains = sorted({row.domain for row in dev})
            tell(figures, fits(Task(chosen.data / "router", model, chosen.share), domains, wanted))
            figures["share"] = chosen.share
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")
    if chosen.report:
        from router_sheet import write_sheet

        write_sheet(figures, chosen.report)


def command(argv: Sequence[str]) -> str:
    """The command line as anybody may type it: of a file outside the checkout only the name."""
    return " ".join(
        ("python", "benchmarks/router.py", *(Path(a).name if Path(a).is_absolute() else a for a in argv[1:]))
    )


def tell(figures: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep what a section found, and print it."""
    figures |= found
    for name, value in found.items():
        print(f"{name:<28} {rounded(value)}", flush=True)


def rounded(value: Any) -> Any:
    """Numbers with four digits, wherever they are."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def live(router: Router, encoders: Encoders, exact: Encoders, dev: list[LabelledPrompt]) -> dict[str, Any]:
    """The live router on the held-out sources."""
    artifact = router.artifact
    held = embed(dev, router.embed)
    adapter = artifact.adapter
    accuracy = artifact.accuracy(held)
    scores = artifact.scores(held.embeddings)
    mistyped = Random(0)
    typed = embed(
        [replace(row, text=typos(row.text, mistyped)) for row in dev], encoders.get(adapter, artifact.words).encode
    )
    float32 = artifact.accuracy(embed(dev, exact.get(adapter, artifact.words).encode))
    crossed = cross_calibrated(artifact, held)
    unseen, sources = (certainty(crossed[name], held) for name in ("halves", "sources"))
    return {
        "dev": {name: value for name, value in accuracy.items() if name != "mean"},
        "dev_mean": accuracy["mean"],
        "dev_linear": linear(artifact, held),
        "ece": expected_calibration_error(*unseen),
        "ece_unseen_source": expected_calibration_error(*sources),
        "ece_in_sample": expected_calibration_error(*certainty(scores, held)),
        "reliability": reliability(*unseen),
        **spread(crossed["halves"], held),
        "refused_as_unknown": float(np.mean([not one.known for one in scores])),
        "int8_drop": float32["mean"] - accuracy["mean"],
        "typo_drop": accuracy["mean"] - artifact.accuracy(typed)["mean"],
    }


def cross_calibrated(artifact: RouterArtifact, held: Rows) -> dict[str, list[Scores]]:
    """Scores of rows that the calibration was not fitted on: the other half of each source, or another source."""
    parity = np.arange(len(held)) % 2
    sources = np.asarray(held.sources)
    folds = {
        "halves": [parity == part for part in (0, 1)],
        "sources": [sources == source for source in sorted(set(held.sources))],
    }
    return {name: _calibrated_outside(artifact, held, parts) for name, parts in folds.items()}


def _calibrated_outside(artifact: RouterArtifact, held: Rows, parts: list[Any]) -> list[Scores]:
    found: dict[int, Scores] = {}
    for inside in parts:
        head, open_set = calibrate(artifact.head, artifact.rows, picked(held, ~inside))
        calibrated = replace(artifact, head=head, open_set=open_set)
        scores = calibrated.scores(picked(held, inside).embeddings)
        found.update(zip(np.flatnonzero(inside).tolist(), scores, strict=True))
    return [found[at] for at in range(len(held))]


def certainty(scores: Sequence[Scores], held: Rows) -> tuple[Floats, Floats]:
    """The probability of each prompt's likeliest domain, and 1 where that is right."""
    confidence = np.asarray([max(one.probabilities.values()) for one in scores], np.float32)
    right = [one.domain == domain for one, domain in zip(scores, held.domains, strict=True)]
    return confidence, np.asarray(right, np.float32)


def spread(scores: Sequence[Scores], held: Rows) -> dict[str, float]:
    """How the probabilities and the prediction sets are spread over the domains."""
    pairs = list(zip(scores, held.domains, strict=True))
    brier = [sum((p - (name == domain)) ** 2 for name, p in one.probabilities.items()) for one, domain in pairs]
    return {
        "brier": float(np.mean(brier)),
        "set_coverage": float(np.mean([domain in one.prediction_set for one, domain in pairs])),
        "set_size": float(np.mean([len(one.prediction_set) for one in scores])),
    }


def picked(rows: Rows, inside: Any) -> Rows:
    """The rows at these places."""
    at = np.flatnonzero(inside)
    names = ([getattr(rows, name)[i] for i in at] for name in ("domains", "sources", "ids", "texts"))
    return Rows(rows.embeddings[at], *(tuple(name) for name in names))


def expected_calibration_error(confidence: Floats, right: Floats) -> float:
    """Mean distance between confidence and accuracy over equal-width bins (Guo et al., 2017)."""
    return sum(abs(at["confidence"] - at["accuracy"]) * at["share"] for at in reliability(confidence, right))


def reliability(confidence: Floats, right: Floats) -> list[dict[str, float]]:
    """Each bin's mean confidence, accuracy and share of the prompts."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
            "share": float((place == b).mean()),
        }
        for b in sorted(set(place.tolist()))
    ]


def peers(
    folder: Path, python: str | None, train: list[LabelledPrompt], dev: list[LabelledPrompt]
) -> dict[str, dict[str, float]]:
    """Accuracy by held-out source of other routers, and the seconds that they took to learn."""
    rows = [row for row in some_of_each_source(train, PEER_ROWS) if row.domain]
    held = embed(dev, lambda texts: np.zeros((len(texts), 1), np.float32))
    out = {}
    with open_peers(folder, python) as found:
        for peer in found:
            start = time.perf_counter()
            peer.fit([row.text for row in rows], [row.domain for row in rows])
            seconds = time.perf_counter() - start
            out[peer.name] = {**right_by_source(peer.predict([row.text for row in dev]), held), "fit_s": seconds}
            print(f"{peer.name:<28} {out[peer.name]['mean']:.4f}  ({seconds:.0f} s)", flush=True)
    return out


def fits(task: Task, domains: Sequence[str], wanted: set[str]) -> dict[str, Any]:
    """What is fitted anew for the wanted sections, a process a core."""
    found: dict[str, dict[str, Any]] = {section: {} for section in wanted & {"intents", "lodo", "steps"}}
    with ExitStack() as opened:
        with one_thread_each():  # submitting starts the processes
            pool = opened.enter_context(ProcessPoolExecutor(cores(), mp_context=get_context("spawn")))
            jobs: dict[Future[Any], tuple[str, str]] = {}
            if "lodo" in wanted:
                jobs |= {pool.submit(without, task, domain): ("lodo", domain) for domain in domains}
            if "intents" in wanted:
                jobs |= {pool.submit(job, task): ("intents", job.__name__) for job in (clinc, banking)}
            if "steps" in wanted:
                jobs |= {pool.submit(step, task, name): ("steps", name) for name in reversed(STEPS)}
        for done in as_completed(jobs):
            section, name = jobs[done]
            found[section][name] = done.result()
            print(f"{section} {name}: {rounded(found[section][name])}", flush=True)
    out: dict[str, Any] = {}
    for each in found.get("intents", {}).values():
        out |= each
    if "steps" in wanted:
        out["steps"] = {name: row for step_name in STEPS for name, row in found["steps"][step_name].items()}
    return out | (_unknown(found["lodo"]) if "lodo" in wanted else {})


def _unknown(lodo: dict[str, Any]) -> dict[str, Any]:
    """Each domain's figures, and their means."""
    each = list(lodo.values())
    return {
        "lodo": lodo,
        "lodo_auroc": float(np.mean([one["auroc"] for one in each])),
        "lodo_recall_at_5": float(np.mean([one["recall_at_5"] for one in each])),
        "add_domain_s": float(np.median([one["add_domain_s"] for one in each])),
        "add_domain_accuracy": float(np.mean([one["added"]["accuracy"] for one in each])),
        "add_domain_cost": float(np.mean([one["added"]["cost_to_others"] for one in each])),
        "described_accuracy": float(np.mean([one["described"]["accuracy"] for one in each])),
        "described_cost": float(np.mean([one["described"]["cost_to_others"] for one in each])),
    }


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started meanwhile compute with one thread each."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main()
