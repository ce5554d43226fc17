"""Curation: rows that would teach nothing, or something wrong, are left out with a reason. docs/examples.md lists these."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .examples import Example
from .neighbours import Neighbours, Sketches, plain
from .personal import personal
from .wording import wording_of

NEAR = 0.9
"""Resemblance from which two questions are taken for one."""
MOST_LABELS = 100
ROWS_A_LABEL = 5
"""A source whose answers are few, each given so often on average, has a closed set of answers, said or not."""
SHOWN = 5
"""Rows that a report names for each reason."""
_REASONS = {
    "empty": "without a question or an answer",
    "malformed": "with broken characters",
    "no_preference": "whose rejected answer is the preferred one",
    "too_long": "longer than the model is trained on",
    "contradiction": "with another answer than most rows of the same question",
    "duplicate": "that another row repeats",
    "held_out": "whose question is held out to measure with",
    "near_duplicate": "nearly the same as another row",
}
_OTHERS = re.compile(r"[^\x00-\x7f]{2,}")
_BROKEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row and why it is named; `of` is the row that it repeats, contradicts or gives away."""

    id: str
    source: str
    why: str
    of: str = ""


@dataclass(frozen=True, slots=True)
class Curated:
    """The rows to train on, in their order; those left out; and those kept that a person should know of."""

    rows: tuple[Example, ...]
    dropped: tuple[Dropped, ...] = ()
    noted: tuple[Dropped, ...] = ()

    def report(self) -> dict[str, Any]:
        """JSON-ready: how many rows, and for each reason how many and which; nothing of what the rows say."""
        return {
            "rows": len(self.rows) + len(self.dropped),
            "kept": len(self.rows),
            "dropped": _by_reason(self.dropped, _REASONS),
            "noted": _by_reason(self.noted, sorted({one.why for one in self.noted})),
        }


def curate(
    rows: Sequence[Example],
    *,
    held_out: Sequence[Example] = (),
    count: Callable[[str], int] | None = None,
    most_tokens: int = 0,
) -> Curated:
    """Check every row; the same rows come out however often they are curated.

    Of rows that repeat each other the first stays. Where a question of a closed set has several answers, the rows of the
    most frequent one stay, and none where two are as frequent. Free answers to one question may differ. `count` counts
    the tokens of a text, and a row may take `most_tokens`.
    """
    dropped: list[Dropped] = []
    sound = []
    for row in rows:
        why = _fault(row)
        if not why and count and 0 < most_tokens < count(_whole(row)):
            why = "too_long"
        if why:
            dropped.append(Dropped(row.id, row.source, why))
        else:
            sound.append(row)
    kept = _once(sound, held_out, dropped)
    # Fewer rows may show a closed set that was not seen as one.
    while closed_sources(kept) - closed_sources(sound):
        sound, kept = kept, _once(kept, held_out, dropped)
    noted = [Dropped(row.id, row.source, kind) for row in kept for kind in personal(_whole(row))]
    return Curated(tuple(kept), tuple(dropped), tuple(noted))


def summary(report: Mapping[str, Any]) -> list[str]:
    """What `Curated.report` says, in sentences for a terminal."""
    lines = [f"{report['kept']:,} of {report['rows']:,} rows are kept."]
    lines += [
        f"{_rows(found['rows'])} {_REASONS[why]}: dropped ({_named(found)})."
        for why, found in report["dropped"].items()
    ]
    return lines + [
        f"{_rows(found['rows'])} with what looks like {kind}: kept ({_named(found)})."
        for kind, found in report["noted"].items()
    ]


def question(row: Example) -> tuple[str, str, str]:
    """The texts that make the row's question: what is asked, about what, and with which choices.

    The topic is one of them where the source's wordings name it: then one text is asked about in several ways.
    """
    earlier = [f"{message.role}: {message.content}" for message in row.history]
    topic = row.topic if any("{topic}" in wording for wording in wording_of(row).wordings) else ""
    return row.prompt, "\n".join([row.context, *earlier]), "\n".join([topic, *sorted(row.choices)])


def closed_sources(rows: Iterable[Example]) -> frozenset[str]:
    """Sources whose answers are a closed set, such as intents, whether their rows name the choices or not."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if not row.rejected:
            answers[row.source][plain(row.answer)] += 1
    return frozenset(
        source
        for source, found in answers.items()
        if len(found) <= MOST_LABELS and found.total() >= ROWS_A_LABEL * len(found)
    )


def _fault(row: Example) -> str:
    """What is wrong with the row by itself; nothing where it is sound."""
    if not (_seen(row.prompt) and _seen(row.answer)):
        return "empty"
    if _is_broken(_whole(row)):
        return "malformed"
    return "no_preference" if plain(row.answer) == plain(row.rejected) else ""


def _seen(text: str) -> bool:
    """Whether a reader sees anything of the text: it may be spaces or characters without a width."""
    return any(not unicodedata.category(character).startswith(("Z", "C")) for character in text)


def _is_broken(text: str) -> bool:
    """Control characters, characters that were lost, or UTF-8 that was read as Windows-1252."""
    return bool(_BROKEN.search(text)) or any(_was_utf8(run) for run in _OTHERS.findall(text))


def _was_utf8(run: str) -> bool:
    try:
        run.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return False
    return True


def _whole(row: Example) -> str:
    """All that is said in the row."""
    texts = [row.context, *(message.content for message in row.history), row.prompt, row.answer]
    return "\n".join(text for text in texts if text) + (f"\n{row.rejected}" if row.rejected else "")


def _once(rows: Sequence[Example], held_out: Sequence[Example], dropped: list[Dropped]) -> list[Example]:
    """The rows that say something new and nothing of what is held out; the others go to `dropped`."""
    every = [*rows, *held_out]
    sketches = Sketches([question(row) for row in every], NEAR)
    right = _majorities(rows, sketches)
    measured, seen = Neighbours(sketches), Neighbours(sketches)
    for place in range(len(rows), len(every)):
        measured.add(place)
    kept = []
    for place, row in enumerate(rows):
        said = plain(row.answer), plain(row.rejected)
        answer, of = right.get(place, said)
        if answer != said[0]:
            dropped.append(Dropped(row.id, row.source, "contradiction", of))
        elif leaks := measured.near(place):
            dropped.append(Dropped(row.id, row.source, "held_out", every[leaks[0]].id))
        elif others := seen.near(place, said):
            same = [other for other in others if sketches.texts[other] == sketches.texts[place]]
            why = "duplicate" if same else "near_duplicate"
            dropped.append(Dropped(row.id, row.source, why, every[[*same, *others][0]].id))
        else:
            seen.add(place, said)
            kept.append(row)
    return kept


def _majorities(rows: Sequence[Example], sketches: Sketches) -> dict[int, tuple[str, str]]:
    """For each row that can be contradicted: the most frequent answer to its question, and the first row that gives it.

    Both are empty where two answers are as frequent. A preference pair is contradicted by the same pair turned around.
    """
    closed = closed_sources(rows)
    votes: dict[Hashable, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row.rejected:
            votes[sketches.texts[place], frozenset((plain(row.answer), plain(row.rejected)))].append(place)
        elif row.choices or row.source in closed:
            votes[sketches.texts[place]].append(place)
    right = {}
    for places in votes.values():
        answers = [plain(rows[place].answer) for place in places]
        (best, most), *others = Counter(answers).most_common(2)
        tied = others and others[0][1] == most
        found = ("", "") if tied else (best, rows[places[answers.index(best)]].id)
        right.update(dict.fromkeys(places, found))
    return right


def _by_reason(found: Sequence[Dropped], reasons: Iterable[str]) -> dict[str, Any]:
    report = {}
    for why in reasons:
        if those := [one for one in found if one.why == why]:
            named = [{"id": one.id, "of": one.of} if one.of else {"id": one.id} for one in those[:SHOWN]]
            report[why] = {"rows": len(those), "examples": named}
    return report


def _rows(number: int) -> str:
    return f"{number:,} {'row' if number == 1 else 'rows'}"


def _named(found: Mapping[str, Any]) -> str:
    names = [f"{one['id']} as {one['of']}" if "of" in one else one["id"] for one in found["examples"]]
    return ", ".join(names) + (", ..." if found["rows"] > len(names) else "")
