"""What benchmarks/router.py fits anew: published protocols, each domain in turn unknown, and the steps of the shipped fit.

Every function is one job of a process with one thread, and returns figures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from data import read_rows

from collegium.models.cache import CachedModel
from collegium.router.artifact import RouterArtifact
from collegium.router.build import LabelledPrompt, build_router, embed, read_pair, some_of_each_source
from collegium.router.encoder import Encoders
from collegium.router.fit import calibrate, fit_head, right_by_source
from collegium.router.neighbours import vote
from collegium.router.router import Router
from collegium.router.rows import BACKGROUND, Rows
from collegium.router.spelling import words_of
from collegium.training.routing.tune_encoder import Tuning, tune_encoder

INTENTS = Tuning(tokens=48, learning_rate=1e-3, augmented=0.1)
"""Intents are many and their prompts short: more steps at a higher rate than domains take."""
FALSE_REJECTS = 0.02
"""Of CLINC150's validation prompts. Its in-scope accuracy counts a refused prompt as an error."""
EXAMPLES = 200
DESCRIPTIONS = {
    "code": "programming, shell commands, databases, algorithms and computer systems",
    "finance": "banking, cards, payments, taxes, accounting, companies and markets",
    "general": "small talk, trivia about history, films, music, sport and places, cooking, travel, reminders and writing",
    "health": "diseases, symptoms, medicines, the human body, nutrition and mental health",
    "law": "contracts, terms of service, privacy policies, courts, crimes, rights and legal disputes",
    "math": "arithmetic, algebra, geometry, probability, equations and word problems with numbers",
    "science": "physics, chemistry, biology, the earth, animals, plants and astronomy",
}
"""One sentence a domain, for adding it from a description alone."""


@dataclass(frozen=True, slots=True)
class Task:
    """Where the data is, which encoder, and the share of the steps to take (1 but for a trial)."""

    data: Path
    model: CachedModel
    share: float = 1.0

    def tuned(self, rows: Sequence[LabelledPrompt], tuning: Tuning, folder: Path) -> Encoders:
        """Tune the encoder on `rows` into `folder`; returns encoders that serve it."""
        import torch

        torch.set_num_threads(1)
        steps = max(4, round(self.share * tuning.steps))
        tune_encoder(self.model, rows, folder, replace(tuning, steps=steps), lambda *_: None)
        return Encoders(self.model, threads=1)

    def pair(self) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
        """The domains' training rows and the held-out sources."""
        return read_pair(self.data / "domains.train.jsonl.gz", self.data / "domains.dev.jsonl.gz")


def clinc(task: Task, steps: int = 1000) -> dict[str, float]:
    """CLINC150 (Larson et al., 2019): accuracy over 150 intents, and recall of prompts that are out of scope.

    Its out-of-scope training prompts are the background; the threshold is set on the validation prompts.
    """
    train = _intents(task, "clinc150.train") + _intents(task, "clinc150.oos_train", BACKGROUND)
    with tempfile.TemporaryDirectory() as folder:
        encoders = task.tuned(train, replace(INTENTS, steps=steps), Path(folder))
        encode = encoders.get(Path(folder), _words(train)).encode
        rows, val, test, outside = (
            embed(part, encode)
            for part in (
                train,
                _intents(task, "clinc150.val"),
                _intents(task, "clinc150.test"),
                _intents(task, "clinc150.oos_val", BACKGROUND),
            )
        )
        head, open_set = calibrate(fit_head(rows), rows, val)
        artifact = RouterArtifact(head, open_set, rows, FALSE_REJECTS, "", None, {})
        found = artifact.scores(test.embeddings)
        right = [one.domain == intent for one, intent in zip(found, test.domains, strict=True)]
        kept = [one.known and hit for one, hit in zip(found, right, strict=True)]
        refused = [not one.known for one in artifact.scores(outside.embeddings)]
    return {
        "clinc_in": float(np.mean(right)),
        "clinc_in_after_rejection": float(np.mean(kept)),
        "clinc_oos_val_recall": float(np.mean(refused)),
    }


def banking(task: Task, steps: int = 1000) -> dict[str, float]:
    """BANKING77 (Casanueva et al., 2020): accuracy over 77 intents."""
    train = _intents(task, "banking77.train")
    with tempfile.TemporaryDirectory() as folder:
        encode = task.tuned(train, replace(INTENTS, steps=steps), Path(folder)).get(Path(folder), _words(train)).encode
        rows, test = embed(train, encode), embed(_intents(task, "banking77.test"), encode)
        head = fit_head(rows)
        chances = head.probabilities(test.embeddings, vote(rows, test.embeddings, head.domains).shares)
        guesses = np.asarray(head.domains)[chances.argmax(axis=1)]
    return {"banking77": float(np.mean(guesses == np.asarray(test.domains)))}


def without(task: Task, domain: str, steps: int = 100) -> dict[str, Any]:
    """A router that never saw `domain`, its encoder included: how it tells it from the known, and how it learns it later."""
    from sklearn.metrics import roc_auc_score

    train, dev = task.pair()
    others = [row for row in train if row.domain != domain]
    known = [row for row in dev if row.domain != domain]
    with tempfile.TemporaryDirectory() as folder:
        encoders = task.tuned(others, Tuning(steps=steps), Path(folder))
        artifact = build_router(others, known, encoders, Path(folder), lambda *_: None)
        held = embed(dev, encoders.get(Path(folder), artifact.words).encode)
        found = artifact.scores(held.embeddings)
        familiar = np.asarray([one.confidence for one in found])
        unknown = np.asarray(held.domains) == domain
        router = Router(artifact, encoders)
        asked = some_of_each_source([row for row in train if row.domain == domain], 100)
        examples = [row.text for row in asked[:: max(1, len(asked) // EXAMPLES)]][:EXAMPLES]
        start = time.perf_counter()
        from_examples = router.add_domain(domain, examples)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        refitted = from_examples.refitted()
        refit_seconds = time.perf_counter() - start
        from_words = router.add_domain(domain, description=DESCRIPTIONS[domain])
    before = artifact.accuracy(held)
    return {
        "auroc": float(roc_auc_score(~unknown, familiar)),
        "recall_at_5": float(np.mean(familiar[unknown] < artifact.threshold)),
        "add_domain_s": seconds,
        "refit_s": refit_seconds,
        "added": _learned(from_examples, held, before, domain),
        "refitted": _learned(refitted, held, before, domain),
        "described": _learned(from_words, held, before, domain),
    }


def step(task: Task, name: str, steps: int = 100) -> dict[str, dict[str, float]]:
    """One step of the shipped fit with all before it: accuracy by held-out source of the regression alone.

    The last step's neighbours vote, too: that is a row of its own.
    """
    train, dev = task.pair()
    data = [row for row in train if not row.source.startswith("own/")]
    plain = Tuning(steps=steps, augmented=0, contrast=0)
    augmented = replace(plain, augmented=Tuning().augmented)
    rows, tuning = {
        "data sets, encoder as it is": (data, None),
        "+ own prompts": (train, None),
        "data sets, encoder tuned": (data, plain),
        "+ own prompts, tuned": (train, plain),
        "+ augmentation": (train, augmented),
        "+ contrast": (train, replace(augmented, contrast=Tuning().contrast)),
    }[name]
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) if tuning else None
        encoders = task.tuned(rows, tuning, Path(folder)) if tuning else Encoders(task.model, threads=1)
        artifact = build_router(rows, dev, encoders, adapter, lambda *_: None)
        held = embed(dev, encoders.get(adapter, artifact.words).encode)
    found = {name: linear(artifact, held)}
    return {**found, "+ neighbours' votes": artifact.accuracy(held)} if name == STEPS[-1] else found


STEPS = (
    "data sets, encoder as it is",
    "+ own prompts",
    "data sets, encoder tuned",
    "+ own prompts, tuned",
    "+ augmentation",
    "+ contrast",
)


def linear(artifact: RouterArtifact, held: Rows) -> dict[str, float]:
    """Accuracy by source without the neighbours' votes."""
    guesses = np.asarray(artifact.head.domains)[artifact.head.logits(held.embeddings).argmax(axis=1)]
    return right_by_source(guesses.tolist(), held)


def _learned(artifact: RouterArtifact, held: Rows, before: dict[str, float], domain: str) -> dict[str, float]:
    """How much of the new domain is right, and what that cost the others on average."""
    after = artifact.accuracy(held)
    others = [source for source in before if source != "mean" and not source.startswith(f"{domain}/")]
    mine = [source for source in before if source.startswith(f"{domain}/")]
    return {
        "accuracy": float(np.mean([after[source] for source in mine])),
        "cost_to_others": float(np.mean([before[source] - after[source] for source in others])),
    }


def _words(rows: Sequence[LabelledPrompt]) -> frozenset[str]:
    return words_of((row.text for row in rows), least=2)


def _intents(task: Task, name: str, label: str | None = None) -> list[LabelledPrompt]:
    rows = read_rows(task.data / f"{name}.jsonl.gz")
    return [
        LabelledPrompt(row["text"], row["intent"] if label is None else label, name, str(i))
        for i, row in enumerate(rows)
    ]
