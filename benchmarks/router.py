"""Accuracy of the shipped router on sources that it was not fitted on: one number a source, and their mean.

    python benchmarks/router.py --quick [--json FILE] [--sweep]

The headline is the mean over unseen sources. A random split of the training sources would measure how well a data set's style
is recognised, not its domain.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from data import need, parser

from collegium.experts.home import Home
from collegium.models.encoder import Encoder
from collegium.router import fit
from collegium.router.artifact import Rows
from collegium.router.build import LabelledPrompt, accuracy_by_source, embed, read_labelled
from collegium.router.router import Router
from collegium.settings import Settings

QUICK_ROWS = 250
"""Rows of each source with --quick."""


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--sweep", action="store_true", help="fit the head anew for several strengths of regularisation"
    )
    chosen = options.parse_args()
    held_out = read_labelled(need(chosen.data / "router") / "domains.dev.jsonl.gz")
    with Home(Settings.load()) as home:
        encoder = Encoder(home.models.get(home.settings.encoder))
        release = home.release()
        router = Router.load(home.artifacts.verify(release.router), encoder, release.router[:12])
    rows = embed(first_of_each_source(held_out, QUICK_ROWS) if chosen.quick else held_out, encoder)
    if chosen.sweep:
        sweep(router.artifact.rows, rows)
        return
    figures = measure(router, rows)
    print(f"router {router.version}, {len(rows)} held-out prompts, domains {', '.join(router.domains)}\n")
    for name, value in figures.items():
        print(f"{name:<24} {value:.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


def measure(router: Router, rows: Rows) -> dict[str, Any]:
    """Accuracy by source, the mean, calibration, the share refused as unknown, and milliseconds a prompt."""
    head = router.artifact.head
    accuracy = accuracy_by_source(head, rows)
    probabilities = head.probabilities(rows.embeddings)
    right = np.asarray(head.domains)[probabilities.argmax(axis=1)] == np.asarray(rows.domains)
    confidence = probabilities.max(axis=1)
    return {
        **{name: value for name, value in accuracy.items() if name != "mean"},
        "dev_mean": accuracy["mean"],
        "ece": expected_calibration_error(confidence, right),
        "refused_as_unknown": round(float((confidence < head.threshold).mean()), 4),
        "ms_a_prompt": milliseconds(router),
    }


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal-width bins (Guo et al., 2017)."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in set(place.tolist())
    ]
    return round(float(sum(gaps)), 4)


def milliseconds(
    router: Router, prompt: str = "How do I list the files of a folder, newest first?", times: int = 50
) -> float:
    """Median wall time of one short prompt."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        router.scores([prompt])
        taken.append(time.perf_counter() - start)
    return round(1000 * float(np.median(taken)), 2)


def sweep(training: Rows, held_out: Rows) -> None:
    """Mean accuracy over the held-out sources for several inverse strengths of regularisation."""
    for strength in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        fit.INVERSE_REGULARISATION = strength
        head = fit.fit_head(training.embeddings, training.domains, training.sources)
        print(f"C = {strength:<5} dev mean {accuracy_by_source(head, held_out)['mean']:.4f}")


def first_of_each_source(rows: list[LabelledPrompt], count: int) -> list[LabelledPrompt]:
    """The first `count` rows of each source."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row.source] = seen.get(row.source, 0) + 1
        if seen[row.source] <= count:
            kept.append(row)
    return kept


if __name__ == "__main__":
    main()
