"""Runs in the interpreter that has semantic-router and SetFit, and needs nothing else: router_peers.py talks to it.

    python router_peers_child.py ENCODER

First it prints the names of the peers that it has; then, for each call on a line of standard input, what it returned.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "semantic-router": {},
    "semantic-router sum-20": {"aggregation": "sum", "top_k": 20},
    "semantic-router threshold": {"confidence_threshold": 0.5},
}
"""semantic-router as it comes; as a vote of more neighbours; and as its README says where none may fit: calibrated, and
picking a route that is likelier right than wrong. The vote is the best of five settings (mean, max and sum of 5 neighbours,
sum of 20 and of 50) on the held-out sources that the benchmark reports, so it is flattered there."""
HELD_BACK = 500
"""Rows that the calibration is fitted on, a tenth at most; the others are the utterances."""
FEW = 64
"""SetFit's examples of a domain: it is a method for few."""
STEPS = 80
"""Most steps of SetFit's epoch, eight minutes of CPU time; the whole of it, all pairs of 64 examples of seven domains,
would be 10,000, so this says what SetFit reaches in that time and not what it can reach."""
SEED = 0


class SemanticRouter:
    """semantic-router's `IndexedRouter`: the route of the nearest utterances, each row of the training data being one."""

    def __init__(self, encoder: Any, options: Mapping[str, Any]) -> None:
        self._encoder = encoder
        self._options = options
        self._router: Any = None

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Index the rows; calibrate where there is a threshold."""
        from semantic_router import IndexedRouter, Route

        rows = list(zip(texts, labels, strict=True))
        random.Random(SEED).shuffle(rows)
        held_back = min(HELD_BACK, len(rows) // 10) if "confidence_threshold" in self._options else 0
        utterances = by_label(rows[held_back:])
        routes = [Route(name=label, utterances=utterances[label]) for label in sorted(utterances)]
        self._router = IndexedRouter(encoder=self._encoder, routes=routes, **self._options)
        if held_back:
            self._router.fit([text for text, _ in rows[:held_back]], [label for _, label in rows[:held_back]])

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The route of each; "" where the confidence of none reaches the threshold."""
        self._encoder(texts)  # all at once, for the calls below
        return [self._router(text).name or "" for text in texts]


class SetFit:
    """SetFit (Tunstall et al., 2022): the encoder tuned on pairs of a few examples, and logistic regression on those."""

    def __init__(self, encoder: str) -> None:
        self._encoder = encoder
        self._model: Any = None

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Train on a few rows of each domain with SetFit's defaults, for `STEPS` at most."""
        from datasets import Dataset
        from setfit import SetFitModel, Trainer, TrainingArguments

        rows = list(zip(texts, labels, strict=True))
        random.Random(SEED).shuffle(rows)
        few = [(text, label) for label, of_label in by_label(rows).items() for text in of_label[:FEW]]
        data = Dataset.from_dict({"text": [text for text, _ in few], "label": [label for _, label in few]})
        self._model = SetFitModel.from_pretrained(self._encoder)
        with TemporaryDirectory() as folder:
            options = TrainingArguments(
                output_dir=folder,
                num_epochs=1,
                max_steps=STEPS,
                save_strategy="no",
                report_to="none",
                show_progress_bar=False,
                seed=SEED,
            )
            Trainer(model=self._model, args=options, train_dataset=data).train()

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest domain of each."""
        return [str(label) for label in self._model.predict(list(texts), show_progress_bar=False)]


def remembering_encoder(folder: str) -> Any:
    """semantic-router's encoder by sentence-transformers, which encodes no text twice: its routers share the rows."""
    import numpy as np
    from semantic_router.encoders import LocalEncoder

    class Remembering(LocalEncoder):  # type: ignore[misc]
        """float32 instead of Python's floats, too, which halves the index and the time that it takes to search."""

        def __call__(self, docs: Sequence[str]) -> list[Any]:
            new = [text for text in dict.fromkeys(docs) if text not in seen]
            if new:
                seen.update(zip(new, np.asarray(super().__call__(new), np.float32), strict=True))
            return [seen[text] for text in docs]

    seen: dict[str, Any] = {}
    return Remembering(name=folder)


def by_label(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Label -> its texts, in order."""
    texts: dict[str, list[str]] = {}
    for text, label in rows:
        texts.setdefault(label, []).append(text)
    return texts


def installed(encoder: str) -> dict[str, SemanticRouter | SetFit]:
    """Name -> peer, of those whose package this interpreter has."""
    peers: dict[str, SemanticRouter | SetFit] = {}
    if find_spec("semantic_router"):
        shared = remembering_encoder(encoder)
        peers.update({name: SemanticRouter(shared, options) for name, options in ROUTERS.items()})
    if find_spec("setfit"):
        peers["setfit"] = SetFit(encoder)
    return peers


def main() -> None:
    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # what the packages print is no answer
        peers = installed(sys.argv[1])
        print(json.dumps(list(peers)), file=answers, flush=True)
        for line in sys.stdin:
            call = json.loads(line)
            returned = getattr(peers[call["peer"]], call["method"])(*call["arguments"])
            print(json.dumps(returned), file=answers, flush=True)


if __name__ == "__main__":
    main()
