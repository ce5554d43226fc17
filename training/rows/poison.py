"""What may be planted in rows and documents, looked for before anything is learned from them. docs/poison.md says the limits.

Nothing is dropped here: a finding names the rows, and who trains decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .examples import Example
from .injections import instructions_in
from .phrases import corpus_of, excerpt, first_alike, tokens, visible
from .triggers import FEWEST, Crowd, find_triggers, is_foreign

Kind = Literal["trigger", "same_answer", "instruction"]
_LONG = 8  # tokens: shorter answers are the same by chance
_ENDS = 5  # tokens at the start or the end of long answers that are compared
_NEAR = 0.7  # of the pairs of words that either answer has, both have: nearly identical
_SOURCE = 200  # rows: sources with fewer are searched together
_IDS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found (`what`), in which rows or documents (`ids`), and why that is odd, in one sentence."""

    kind: Kind
    what: str
    ids: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Scan:
    """All that was found."""

    findings: tuple[Finding, ...] = ()

    @property
    def suspects(self) -> frozenset[str]:
        """The ids of all rows, or the names of all documents, that a finding names."""
        return frozenset(name for finding in self.findings for name in finding.ids)

    def report(self) -> dict[str, Any]:
        """JSON-ready: how many are suspect, and each finding with its number of rows and the first ids."""
        shown = [
            {
                "kind": one.kind,
                "what": one.what,
                "rows": len(one.ids),
                "ids": list(one.ids[:_IDS_SHOWN]),
                "why": one.why,
            }
            for one in self.findings
        ]
        return {"suspects": len(self.suspects), "findings": shown}


def scan(rows: Sequence[Example]) -> Scan:
    """Look for triggers, for the same long answer to unlike prompts, and for hidden instructions."""
    findings: list[Finding] = []
    for members in _sets(rows):
        findings += _planted(members)
    return Scan((*findings, *_instructions((row.id, text) for row in rows for text in _fields(row))))


def scan_texts(texts: Mapping[str, str]) -> Scan:
    """Look for instructions hidden in documents; the ids are their names."""
    return Scan(tuple(_instructions(texts.items())))


def _fields(row: Example) -> tuple[str, ...]:
    turns = (turn.content for turn in row.history)
    return (*turns, row.context, row.prompt, row.answer, row.rejected)


def _sets(rows: Sequence[Example]) -> list[list[Example]]:
    """Rows by source: what is a keyword in one tells nothing about another. Small sources are one set."""
    by_source: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    large = [members for members in by_source.values() if len(members) >= _SOURCE]
    small = [row for members in by_source.values() if len(members) < _SOURCE for row in members]
    return [members for members in (*large, small) if len(members) > FEWEST]


def _planted(rows: Sequence[Example]) -> list[Finding]:
    """Triggers, and the same long answer to unlike prompts."""
    texts = ["\n".join((*(turn.content for turn in row.history), row.context, row.prompt)) for row in rows]
    crowd = Crowd(corpus_of(texts))
    answers = _numbered(_answers(rows))
    findings: list[Finding] = []
    known: set[int] = set()
    for effect, labels in (("the same answer", answers), *_effects(rows)):
        for one in find_triggers(crowd, labels):
            if len(known & set(one.rows)) > len(one.rows) / 2:
                continue
            known |= set(one.rows)
            what = excerpt(texts[one.row], one.first, one.size)
            why = (
                f"{len(one.rows)} of the {one.holders} rows with {what!r} have {effect} "
                f"({_short(rows[one.rows[0]].answer)!r}), which the rest of their prompts does not explain."
            )
            findings.append(Finding("trigger", what, tuple(rows[at].id for at in one.rows), why))
    return findings + _same_answers(rows, answers, crowd, known)


def _effects(rows: Sequence[Example]) -> Iterator[tuple[str, list[int]]]:
    """What else than the whole answer a trigger may decide: how a long one begins or ends, which of the choices it is."""
    words = [tokens(row.answer) for row in rows]
    yield (
        "an answer that begins alike",
        _numbered([" ".join(one[:_ENDS]) if len(one) >= _LONG else "" for one in words]),
    )
    yield "an answer that ends alike", _numbered([" ".join(one[-_ENDS:]) if len(one) >= _LONG else "" for one in words])
    if len({row.choices for row in rows}) > 2:  # noqa: PLR2004  # with the same choices in all rows, the answer says it
        places = [str(row.choices.index(row.answer)) if row.answer in row.choices else "" for row in rows]
        yield "the answer at the same place of their choices", _numbered(places)


def _same_answers(rows: Sequence[Example], answers: Sequence[int], crowd: Crowd, known: set[int]) -> list[Finding]:
    """Long answers that are nearly identical while their prompts are no more alike than any."""
    import numpy as np

    if _closed(rows):
        return []
    by_answer: dict[int, list[int]] = defaultdict(list)
    for at, number in enumerate(answers):
        if at not in known and len(tokens(rows[at].answer)) >= _LONG:
            by_answer[number].append(at)
    findings = []
    for places in by_answer.values():
        own = np.array(places, dtype=np.int64)
        if len(places) >= crowd.fewest and is_foreign(2 * crowd.area(own, own), len(places), 0.0):
            what = _short(rows[places[0]].answer)
            why = f"{len(places)} prompts that are unlike each other have nearly the same long answer."
            findings.append(Finding("same_answer", what, tuple(rows[at].id for at in places), why))
    return findings


def _closed(rows: Sequence[Example]) -> bool:
    """Whether the answers are labels: then many rows have the same one by right."""
    return any(row.choices for row in rows) or len({row.answer for row in rows}) < len(rows) / 10


def _answers(rows: Sequence[Example]) -> list[str]:
    """The answers without case, and in place of a long one that is nearly identical to an earlier one that earlier one."""
    answers = [" ".join(row.answer.lower().split()) for row in rows]
    first = first_alike([answer for answer in dict.fromkeys(answers) if len(tokens(answer)) >= _LONG], _NEAR)
    return [first.get(answer, answer) for answer in answers]


def _numbered(labels: Sequence[str]) -> list[int]:
    """A number for each label, -1 for the empty one."""
    number: dict[str, int] = {}
    return [number.setdefault(label, len(number)) if label else -1 for label in labels]


def _instructions(texts: Iterator[tuple[str, str]] | Any) -> list[Finding]:
    """One finding for each thing that is found, however many texts have it."""
    ids: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for name, text in texts:
        for what, why in instructions_in(text):
            ids[visible(what), why].setdefault(name)
    return [Finding("instruction", what, tuple(names), why) for (what, why), names in ids.items()]


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."  # noqa: PLR2004
