"""Other routers, asked the same prompts as ours.

They learn from some of the rows that ours was fitted on; those with an encoder begin with the same published one.

semantic-router needs an older `openai` than the project's, so it and SetFit run in an interpreter of their own, which is
no dependency and which `--peers peers/bin/python` names:

    python3 -m venv peers
    peers/bin/pip install semantic-router==1.1.1 setfit==1.2.0 sentence-transformers==6.2.0 torch==2.13.0

An interpreter that lacks one of the two leaves that one out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

CHILD = Path(__file__).parent / "router_peers_child.py"
PACKAGES = {
    "semantic-router": "semantic-router==1.1.1",
    "semantic-router sum-20": "semantic-router==1.1.1",
    "semantic-router threshold": "semantic-router==1.1.1",
    "setfit": "setfit==1.2.0",
}
"""Peers of the other interpreter -> what they need there; router_peers_child.py says what each is."""
ERROR_CHARS = 2000
WARM_UP = 5


class Peer(Protocol):
    """A router to compare with."""

    @property
    def name(self) -> str:
        """What its row of the table is called."""

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Learn which prompts belong to which domain, anew."""

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The domain of each; "" where it picks none."""


class Random:
    """Any domain as likely as another: the floor."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._domains: list[str] = []

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Only the names of the domains count."""
        self._domains = sorted(set(labels))

    def predict(self, texts: Sequence[str]) -> list[str]:
        """A draw for each."""
        return self._random.choices(self._domains, k=len(texts))


class Tfidf:
    """TF-IDF of words and pairs of words, and logistic regression: no encoder at all."""

    name = "tfidf"

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        self._model: Any = make_pipeline(words, LogisticRegression(max_iter=1000))

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Words that occur in one prompt only are left out."""
        self._model.fit(texts, labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest domain of each."""
        return [str(label) for label in self._model.predict(texts)]


class Frozen:
    """The encoder as it was published, by sentence-transformers, and logistic regression."""

    name = "frozen"

    def __init__(self, encoder: Path) -> None:
        from sentence_transformers import SentenceTransformer
        from sklearn.linear_model import LogisticRegression

        self._encoder: Any = SentenceTransformer(str(encoder))
        self._head: Any = LogisticRegression(max_iter=1000)

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Only the regression learns."""
        self._head.fit(self._encoder.encode(list(texts)), labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest domain of each."""
        return [str(label) for label in self._head.predict(self._encoder.encode(list(texts)))]


class Child:
    """router_peers_child.py in an interpreter that has other packages than this one."""

    def __init__(self, python: str, encoder: Path, errors: TextIO) -> None:
        self._errors = errors
        self._process = subprocess.Popen(  # noqa: S603
            [python, str(CHILD), str(encoder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # the encoder is a folder: nothing needs fetching
        )
        self.names: list[str] = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def ask(self, peer: str, method: str, *arguments: Sequence[str]) -> Any:
        """What that method of that peer returns."""
        assert self._process.stdin is not None
        request = {"peer": peer, "method": method, "arguments": [list(argument) for argument in arguments]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SystemExit(f"{CHILD.name} failed:\n{self._errors.read()[-ERROR_CHARS:]}")
        return json.loads(line)


class InChild:
    """A peer of the other interpreter."""

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self._child = child

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """As router_peers_child.py does it."""
        self._child.ask(self.name, "fit", texts, labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """As router_peers_child.py does it."""
        return [str(label) for label in self._child.ask(self.name, "predict", texts)]


@contextmanager
def open_peers(encoder: Path, python: str | None) -> Iterator[list[Peer]]:
    """Every peer that can run; a line is printed for each that is left out.

    `encoder` is a sentence-transformers folder, `python` the other interpreter.
    """
    here: list[Peer] = [Random(), Tfidf(), Frozen(encoder)]
    found = python and shutil.which(python)
    if not found:
        _tell_missing(list(PACKAGES))
        yield here
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, Child(found, encoder, errors) as child:
        _tell_missing([name for name in PACKAGES if name not in child.names])
        yield [*here, *(InChild(name, child) for name in child.names)]


def st_latency(folder: Path, texts: Sequence[str]) -> float:
    """Median wall seconds that sentence-transformers takes to encode one text on the CPU, over these texts."""
    from sentence_transformers import SentenceTransformer

    encoder: Any = SentenceTransformer(str(folder), device="cpu")
    for text in texts[:WARM_UP]:
        encoder.encode([text])
    taken = []
    for text in texts:
        start = time.perf_counter()
        encoder.encode([text])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _tell_missing(names: Sequence[str]) -> None:
    for name in names:
        print(f"{name}: not installed; --peers names an interpreter with {PACKAGES[name]} (see {Path(__file__).name}).")
