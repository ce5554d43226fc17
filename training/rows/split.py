"""Rows to train on and rows to measure with, such that what is measured was not seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import InvalidRequest
from ...schema import digest
from ..measuring.gate import FEWEST_ROWS
from .curate import NEAR, closed_sources, question
from .examples import Example, to_json
from .neighbours import Neighbours, Sketches, plain

HELD_OUT = 10
"""One row in so many is held out to measure with."""


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Rows that stay together, by their places; `key` is of their content, `label` what their answers are."""

    rows: tuple[int, ...]
    key: str
    source: str
    label: str


def split(rows: Sequence[Example], *, test_limit: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows: of each source a tenth, `FEWEST_ROWS` at least, and `test_limit` in all at most.

    Rows of one group stay together. So do rows without a group that share a context or ask nearly the same; a context
    that every row has tells them nothing. Of a closed set of answers each is held out as often as it is given. Where a
    group is all that can be held out and is larger than `test_limit`, its other rows are on neither side.

    Which side a row is on depends on what the rows say and on `seed`, not on their order. Raises InvalidRequest for rows
    that cannot be split.
    """
    if len(rows) <= 1 or test_limit < 1:
        raise InvalidRequest(
            "One example is too few: some are trained on, others are held out.", hint="Give ten at least."
        )
    keys = [digest([seed, {**one, "id": "", "source": ""}]) for one in to_json(rows)]
    bundles = _bundles(rows, keys)
    if len(bundles) == 1:
        raise InvalidRequest(
            "The examples cannot be split: all of them are of one group, or ask nearly the same.",
            hint="Name rows to measure with (--test), or give the rows more than one group.",
        )
    taken, held = _held_out(bundles, test_limit)
    order = sorted(range(len(rows)), key=lambda place: (keys[place], rows[place].source, rows[place].id))
    return [rows[place] for place in order if place not in taken], [rows[place] for place in order if place in held]


def _bundles(rows: Sequence[Example], keys: Sequence[str]) -> list[_Bundle]:
    closed = closed_sources(rows)
    found: dict[int, list[int]] = defaultdict(list)
    for place, root in enumerate(_roots(rows)):
        found[root].append(place)
    bundles = []
    for places in found.values():
        places.sort(key=lambda place: (keys[place], rows[place].source, rows[place].id))
        kinds = Counter(
            (rows[place].source, plain(rows[place].answer) if rows[place].source in closed else "") for place in places
        )
        source, label = min(kinds, key=lambda kind: (-kinds[kind], kind))
        bundles.append(_Bundle(tuple(places), digest([keys[place] for place in places]), source, label))
    return sorted(bundles, key=lambda bundle: (bundle.key, bundle.source))


def _roots(rows: Sequence[Example]) -> list[int]:
    """For each row the place of the row that stands for all that it must stay with."""
    parents = list(range(len(rows)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    for one, other in _ties(rows):
        parents[root(one)] = root(other)
    return [root(place) for place in range(len(rows))]


def _ties(rows: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Pairs of rows that stay together, enough of them to join all that do."""
    alone = [place for place, row in enumerate(rows) if not row.group]
    contexts = {place: plain(rows[place].context) for place in alone}
    if len(alone) == len(rows) and len(set(contexts.values())) == 1:
        contexts = {}
    first: dict[tuple[str, ...], int] = {}
    for place, row in enumerate(rows):
        if row.group:
            yield first.setdefault(("group", row.group), place), place
        elif contexts.get(place):
            yield first.setdefault(("context", contexts[place]), place), place
    sketches = Sketches([question(rows[place]) for place in alone], NEAR)
    neighbours = Neighbours(sketches)
    for number, place in enumerate(alone):
        known = ("question", *sketches.texts[number])
        if known in first:
            yield first[known], place
            continue
        first[known] = place
        for other in neighbours.near(number):
            yield alone[other], place
        neighbours.add(number)


def _held_out(bundles: Sequence[_Bundle], test_limit: int) -> tuple[set[int], set[int]]:
    """The rows that are not trained on, and those of them that are measured with."""
    by_source: dict[str, list[_Bundle]] = defaultdict(list)
    for bundle in bundles:
        by_source[bundle.source].append(bundle)
    sizes = {source: sum(len(one.rows) for one in those) for source, those in sorted(by_source.items())}
    taken: list[_Bundle] = []
    for source, share in _shares(sizes, test_limit).items():
        taken += _drawn(by_source[source], share)
    left = test_limit - sum(len(bundle.rows) for bundle in taken)
    for source, size in sizes.items():
        for bundle in _more(by_source[source], taken, size, left):
            taken.append(bundle)
            left -= len(bundle.rows)
    taken = taken or [min(bundles, key=lambda bundle: len(bundle.rows))]
    held = [place for bundle in taken for place in bundle.rows]
    return set(held), set(held[:test_limit])


def _shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Rows to hold out of each source: what it should have, or its part of `total`; a task with few rows cannot be judged."""
    wanted = {source: max(size // HELD_OUT, min(FEWEST_ROWS, size // 2)) for source, size in sizes.items()}
    least = {source: min(FEWEST_ROWS, share) for source, share in wanted.items()}
    enough = total >= sum(least.values())
    low, high = (least, wanted) if enough else (dict.fromkeys(sizes, 0), least)
    spare, span = total - sum(low.values()), sum(high.values()) - sum(low.values())
    if spare >= span:
        return high
    return {source: low[source] + spare * (high[source] - low[source]) // span for source in sizes}


def _drawn(bundles: Sequence[_Bundle], share: int) -> list[_Bundle]:
    """About `share` rows and no more, at even distances among those that are sorted by their label."""
    ordered = sorted(bundles, key=lambda bundle: bundle.label)
    places = [bundle for bundle in ordered for _ in bundle.rows]
    drawn = [places[int((number + 0.5) * len(places) / share)] for number in range(share)]
    taken = []
    for bundle in dict.fromkeys([*drawn, *bundles]):
        if len(bundle.rows) <= share:
            taken.append(bundle)
            share -= len(bundle.rows)
    return taken


def _more(bundles: Sequence[_Bundle], taken: Sequence[_Bundle], size: int, left: int) -> Iterator[_Bundle]:
    """Of a source with too few rows to be judged: its smallest bundles, while half of its rows are left to train on."""
    gone = set(taken)
    held = sum(len(bundle.rows) for bundle in bundles if bundle in gone)
    for bundle in sorted((one for one in bundles if one not in gone), key=lambda one: len(one.rows)):
        if held >= FEWEST_ROWS or len(bundle.rows) > left or 2 * (held + len(bundle.rows)) > size:
            return
        yield bundle
        held += len(bundle.rows)
        left -= len(bundle.rows)
