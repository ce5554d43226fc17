"""What a model asks about a passage, and what it answers from it, held against that passage. No model is needed for that."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set

from ..measuring.evaluate import token_f1
from .prose import content_words, sentences

Why = str
"""Why something is dropped; empty where it is kept."""
ALIKE = 0.8
"""The share of words in common (Jaccard) from which two questions are the same."""
FEWEST_WORDS = 2
"""Words that a question needs to say what it is about."""
SUPPORTED, IN_ONE_PLACE = 0.9, 0.6
"""The share of an answer's words that stand in its passage, and in two sentences of it that follow each other."""
ROUND, OWN = 8, 0.5
"""An answer of so many words of which fewer than this share are different goes round in circles, as small models do."""

_LABEL = re.compile(r"^\W*(?:question|q)?\s*\d*\s*[:.)]\s+", re.I)
_LAST_CLAUSE = re.compile(r"(?<=[.!:])[\"']?\s+")
_ASKS = re.compile(r"[?\uff1f\u061f\u037e]")
_LEANS = re.compile(
    r"\b(?:(?:this|the|that|these|following|given|above|preceding) (?:[a-z]+ )?(?:passage|text|document|documentation|section|"
    r"paragraph|article|author|excerpt|quote|sentence|question|answer|statement|code|snippet|example)s?|"
    r"mentioned|above|below|your)\b|\]\[|\]\(",
    re.I,
)
_ENDS = re.compile(r"[.!?\"'`)\]\u3002]$")


def question_in(said: str) -> str:
    """The question in what a model wrote, without what it says around it; empty where there is none."""
    for line in said.splitlines():
        if mark := _ASKS.search(line):
            asked = _LABEL.sub("", line[: mark.end()].strip())
            return _LAST_CLAUSE.split(asked)[-1].lstrip(" \"'*`-")
    return ""


def unfit(question: str, before: Iterable[Set[str]]) -> Why:
    """Why a question cannot be asked by itself, or beside those whose content words were `before`."""
    words = set(content_words(question))
    if not question:
        return "is no question"
    if len(words) < FEWEST_WORDS or _LEANS.search(question):
        return "does not stand by itself"
    if any(len(words & other) >= ALIKE * len(words | other) for other in before):
        return "was asked before"
    return ""


def whole(said: str) -> str:
    """An answer's first paragraph, without a sentence that breaks off."""
    first = " ".join(re.split(r"\n\s*\n", said.strip())[0].split())
    found = sentences(first)
    return " ".join(found[:-1]) if len(found) > 1 and not _ENDS.search(found[-1]) else first


def unsupported(question: str, answer: str, passage: str) -> Why:
    """Why the passage does not support the answer."""
    new = _own_words(question, answer)
    if not new:
        return "says no more than its question"
    if len(new) >= ROUND and len(set(new)) < OWN * len(new):
        return "goes round in circles"
    if _share(new, passage) < SUPPORTED:
        return "says what its passage does not"
    told = sentences(" ".join(passage.split()))
    pairs = (f"{one} {following}" for one, following in zip(told, [*told[1:], ""], strict=True))
    if max(_share(new, pair) for pair in pairs) < IN_ONE_PLACE:
        return "is put together from all over its passage"
    return ""


def agreement(question: str, answer: str, again: str) -> float:
    """F1 of two answers over the words that are not the question's own: those would agree in any case."""
    return token_f1(" ".join(_own_words(question, answer)), " ".join(_own_words(question, again)))


def _own_words(question: str, answer: str) -> list[str]:
    asked = set(content_words(question))
    return [word for word in content_words(answer) if word not in asked]


def _share(words: Sequence[str], text: str) -> float:
    there = set(content_words(text))
    return sum(word in there for word in words) / len(words)
