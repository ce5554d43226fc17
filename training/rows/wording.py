"""How an example is put to a model: as a person would ask it, in several wordings.

An expert that has seen one wording a task answers tasks, not people (robustness to instructions is lost first; *Evaluating
the Robustness to Instructions of Large Language Models*). The wordings of known sources are in wordings.yaml; rows of other
sources take a form that fits what they carry. The first wording is the one that scores are measured with.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .examples import Example


@dataclass(frozen=True, slots=True)
class Wording:
    """The wordings of one source.

    `labels` says where the closed set of answers comes from when rows carry none: every answer of the `source` or of the
    row's `topic` in the training rows, or `rows` alone. `metric` is what the task is scored by; `case` says whether
    capitals count in an exact match.
    """

    wordings: tuple[str, ...]
    labels: Literal["rows", "source", "topic"] = "rows"
    metric: Literal["accuracy", "exact_match", "likelihood"] = "exact_match"
    max_labels: int = 100
    case: bool = False


_PLAIN = Wording(("{prompt}",))
_FROM_CONTEXT = Wording(("{context}\n\nQuestion: {prompt}", "Read this and answer: {prompt}\n\n{context}"))
_CHOICES = Wording(("{prompt}\nAnswer with one of: {choices}", "{prompt}\n{choices}"), metric="accuracy")
_CHOICES_FROM_CONTEXT = Wording(("{context}\n\n{prompt}\nAnswer with one of: {choices}",), metric="accuracy")


@functools.cache
def known_wordings() -> Mapping[str, Wording]:
    """The wordings that ship with the project, by source."""
    import yaml

    sources = yaml.safe_load((Path(__file__).parent / "wordings.yaml").read_text("utf-8"))
    return {name: Wording(**{**body, "wordings": tuple(body["wordings"])}) for name, body in sources.items()}


def wording_of(example: Example) -> Wording:
    """The wordings that fit the example: its source's, or by what the row carries."""
    if known := known_wordings().get(example.source):
        return known
    if example.choices:
        return _CHOICES_FROM_CONTEXT if example.context else _CHOICES
    return _FROM_CONTEXT if example.context else _PLAIN


def ask(example: Example, *, rng: random.Random | None = None, wording: int = 0) -> str:
    """The prompt: in a wording drawn with `rng`, or in the one of this number."""
    wordings = wording_of(example).wordings
    template = rng.choice(wordings) if rng else wordings[wording]
    choices = list(example.choices)
    topic = example.topic.replace("_", " ").replace("-", " ")
    fields = {"prompt": example.prompt.strip(), "context": example.context.strip(), "topic": topic}
    return template.format(**fields, choices=", ".join(choices))


def close_labels(rows: Iterable[Example], training: Iterable[Example]) -> list[Example]:
    """Give rows without choices the closed set that their source declares, read off the training rows alone."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for example in training:
        seen[example.source, ""].add(example.answer)
        seen[example.source, example.topic].add(example.answer)

    def closed(example: Example) -> Example:
        wording = wording_of(example)
        if example.choices or wording.labels == "rows":
            return example
        labels = seen[example.source, example.topic if wording.labels == "topic" else ""]
        return replace(example, choices=tuple(sorted(labels))) if 1 < len(labels) <= wording.max_labels else example

    return [closed(example) for example in rows]
