"""Which experts there are, what each name means now, and what it meant before.

A release is one immutable row; `live` points at one of them. Publishing adds a release and moves the pointer in one
transaction, so a reader sees the whole of the old state or the whole of the new one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Row, insert, select, update

from ..errors import InvalidRequest, UnknownExpert
from ..schema import Card, Release, card_from_dict, card_to_dict
from . import tables
from .database import open_database, translated, writing

Change = Mapping[str, str | None]
_SHORTEST = 6  # digits of a hash that may stand for it
_SHOWN = 12
_VERSION = re.compile(f"(?P<name>.+)@(?P<hash>[0-9a-f]{{{_SHORTEST},}})")
_NOTHING: Change = MappingProxyType({})


class Registry:
    """Cards and releases in a database that threads and processes share."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database that an SQLAlchemy URL names (`sqlite:////path/to/file`, `postgresql://...`).

        Creates it where there is none and upgrades an older one. Raises SettingsError for a URL that cannot be used,
        DatabaseTooNew for a database of a newer version. Every method may raise NoSpace, Overloaded (another process
        did not let go of the database in time) and ArtifactCorrupt.
        """
        return cls(open_database(url))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @property
    def engine(self) -> Engine:
        """The database, for what else is kept in it (`decisions.py`)."""
        return self._engine

    def live(self) -> Release | None:
        """Return what serves now; None before the first publish."""
        with self._reading() as connection:
            return _live(connection)

    def releases(self) -> tuple[Release, ...]:
        """Every release, newest first."""
        with self._reading() as connection:
            rows = connection.execute(select(tables.releases).order_by(tables.releases.c.id.desc()))
            return tuple(_release(row) for row in rows)

    def cards(self) -> tuple[Card, ...]:
        """Every card, by name, and the oldest first within one."""
        table = tables.cards
        with self._reading() as connection:
            rows = connection.execute(select(table.c.body).order_by(table.c.name, table.c.created, table.c.version))
            return tuple(card_from_dict(body) for body in rows.scalars())

    def card(self, version: str) -> Card:
        """Return the card of one version, such as `law@3f2a91c07be4`. Raises UnknownExpert."""
        with self._reading() as connection:
            table = tables.cards
            body = connection.scalar(select(table.c.body).where(table.c.version == version))
            if body is None:
                known = connection.scalars(select(table.c.version).order_by(table.c.version))
                raise UnknownExpert(f"No expert has the version {version!r}.", hint=_known(known))
            return card_from_dict(body)

    def resolve(self, name: str, release: Release) -> Card:
        """Find the card that a name means in a release: `law` through its aliases, `law@3f2a91` whatever they say.

        The hash may be shortened to 6 digits or more as long as only one version fits. Raises UnknownExpert.
        """
        if name in release.aliases:
            return self.card(release.aliases[name])
        match = _VERSION.fullmatch(name)
        if not match:
            raise UnknownExpert(f"No expert is named {name!r}.", hint=_known(release.aliases))
        table = tables.cards
        like = table.c.version.startswith(name, autoescape=True)
        with self._reading() as connection:
            # The name is compared too, because LIKE takes no notice of case on SQLite.
            query = select(table.c.version, table.c.body).where(table.c.name == match["name"], like)
            rows = connection.execute(query.order_by(table.c.version)).all()
        if len(rows) > 1:
            raise UnknownExpert(f"{name!r} fits several versions.", hint=_known(row.version for row in rows))
        if not rows:
            raise UnknownExpert(f"No expert has the version {name!r}.", hint=_known(release.aliases))
        return card_from_dict(rows[0].body)

    def router(self, name: str) -> str:
        """Find the router that a release's id means, or the first 6 digits or more of a router's version.

        Raises InvalidRequest, which lists the releases with their routers.
        """
        releases = self.releases()
        by_id = {str(release.id): release.router for release in releases}
        fits = {by_id[name]} if name in by_id else _starting(name, by_id.values())
        if len(fits) != 1:
            known = ", ".join(f"{number} ({router[:_SHOWN]})" for number, router in by_id.items())
            what = "fits several routers" if fits else "is neither a release nor a router"
            raise InvalidRequest(f"{name!r} {what}.", hint=f"Releases and their routers: {known or 'none yet'}.")
        return fits.pop()

    def publish(
        self,
        *,
        cards: Iterable[Card] = (),
        aliases: Change = _NOTHING,
        router: str | None = None,
        indexes: Change = _NOTHING,
        note: str,
    ) -> Release:
        """Make a new release of the live one and these changes, and point `live` at it. It is on the disk on return.

        In `aliases` (name to version) and `indexes` (domain to index version) None takes a name away. A card that is
        known already gets the new evidence. Raises InvalidRequest where an alias names a version without a card, and
        where the first release has no router; then nothing has changed.
        """
        with self._writing() as connection:
            now = _now()
            before = _live(connection)
            router = router or (before.router if before else None)
            if router is None:
                raise InvalidRequest("The first release needs a router.")
            _store(connection, cards, now)
            _check(connection, aliases)
            body = {
                "aliases": _merge(before.aliases if before else {}, aliases),
                "router": router,
                "indexes": _merge(before.indexes if before else {}, indexes),
            }
            row = {"body": body, "parent": before and before.id, "note": note, "created": now}
            release = _release(
                connection.execute(insert(tables.releases).values(row).returning(*tables.releases.c)).one()
            )
            _point(connection, release)
        return release

    def rollback(self, release_id: int) -> Release:
        """Point `live` at an earlier release (or a later one). Raises InvalidRequest, which lists the ids there are."""
        table = tables.releases
        with self._writing() as connection:
            row = connection.execute(select(table).where(table.c.id == release_id)).one_or_none()
            if row is None:
                ids = ", ".join(str(known) for known in connection.scalars(select(table.c.id).order_by(table.c.id)))
                raise InvalidRequest(f"There is no release {release_id}.", hint=f"Releases: {ids or 'none'}.")
            release = _release(row)
            _point(connection, release)
        return release

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """One writer at a time: SQLite locks when the transaction begins, others by the pointer's row."""
        with translated(), writing(self._engine) as connection:
            connection.execute(select(tables.live).with_for_update()).one()
            yield connection


def _live(connection: Connection) -> Release | None:
    row = connection.execute(select(tables.releases).join(tables.live)).one_or_none()
    return None if row is None else _release(row)


def _release(row: Row[Any]) -> Release:
    return Release(id=row.id, parent=row.parent, note=row.note, created=row.created, **row.body)


def _point(connection: Connection, release: Release) -> None:
    connection.execute(update(tables.live).values(release=release.id))


def _store(connection: Connection, cards: Iterable[Card], now: str) -> None:
    table = tables.cards
    for card in cards:
        body = card_to_dict(card)
        if connection.execute(update(table).where(table.c.version == card.version).values(body=body)).rowcount == 0:
            row = {"version": card.version, "name": card.name, "domain": card.domain, "body": body, "created": now}
            connection.execute(insert(table).values(row))


def _check(connection: Connection, aliases: Change) -> None:
    wanted = {version for version in aliases.values() if version is not None}
    known = set(connection.scalars(select(tables.cards.c.version).where(tables.cards.c.version.in_(wanted))))
    if wanted - known:
        missing = ", ".join(sorted(wanted - known))
        raise InvalidRequest(f"No card has the version {missing}.", hint="Publish the card together with its alias.")


def _merge(old: Mapping[str, str], change: Change) -> dict[str, str]:
    return {name: version for name, version in {**old, **change}.items() if version is not None}


def _starting(name: str, routers: Iterable[str]) -> set[str]:
    return {router for router in routers if len(name) >= _SHORTEST and router.startswith(name)}


def _known(names: Iterable[str]) -> str:
    return f"Known: {', '.join(sorted(names)) or 'none yet'}."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
