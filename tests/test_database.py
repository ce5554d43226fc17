from __future__ import annotations

import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from collegium.errors import ArtifactCorrupt, DatabaseTooNew, NoSpace, Overloaded, SettingsError
from collegium.experts import tables
from collegium.experts.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROUTER = {"body": {"aliases": {}, "router": "r", "indexes": {}}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "registry.db"


@pytest.fixture
def url(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry.open(url)
    yield registry
    registry.close()


@pytest.fixture
def on_connections() -> Iterator[Callable[[str], None]]:
    """Run a statement on every SQLite connection when it is next taken from a pool."""
    listeners: list[Callable[..., None]] = []

    def run(statement: str) -> None:
        def listener(connection: Any, *_: object) -> None:
            connection.execute(statement).close()

        listeners.append(listener)
        sa.event.listen(sa.Pool, "checkout", listener)

    yield run
    for listener in listeners:
        sa.event.remove(sa.Pool, "checkout", listener)


def test_migrations_end_at_the_tables(registry: Registry, url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "collegium.experts:migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == tables.HEAD
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []
    engine.dispose()


def test_a_database_of_this_version_opens_without_alembic(registry: Registry, url: str) -> None:
    program = f"import sys; from collegium.experts.registry import Registry; Registry.open({url!r}).close()"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'alembic' not in sys.modules"], check=True, timeout=60)


def test_an_older_database_is_upgraded_and_keeps_what_it_holds(registry: Registry, url: str, file: Path) -> None:
    from alembic import command
    from alembic.config import Config

    first = registry.publish(router="r", note="")
    registry.close()
    older = f"sqlite:///{file.with_name('older.db')}"
    engine = sa.create_engine(older)
    config = Config()
    config.set_main_option("script_location", "collegium.experts:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.insert(tables.releases).values(parent=None, note="", created=first.created, **ROUTER))
        connection.execute(sa.update(tables.live).values(release=1))
        assert not sa.inspect(connection).has_table("decisions")
    engine.dispose()
    upgraded = Registry.open(older)
    assert upgraded.live() == first
    with upgraded.engine.connect() as connection:
        assert sa.inspect(connection).has_table("decisions")
    upgraded.close()


def test_readers_go_on_beside_a_writer_and_there_is_one_pointer(registry: Registry, file: Path) -> None:
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("INSERT INTO live (id) VALUES (2)")
    connection.close()


def test_a_newer_database_is_refused_and_left_alone(registry: Registry, url: str, file: Path) -> None:
    first = registry.publish(router="r", note="")
    for version, outcome in (("9999", DatabaseTooNew), (tables.HEAD, None)):
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", [version])
        connection.close()
        if outcome:
            with pytest.raises(outcome, match=r"9999.*Upgrade"):
                Registry.open(url)
    again = Registry.open(url)
    assert again.live() == first
    again.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?uri=true",
        "mysql://x/y",
        "postgresql+no://x/y",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="database_url"):
        Registry.open(url)


def test_a_database_that_cannot_be_opened_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(ArtifactCorrupt, match="not a database"):
        Registry.open(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(SettingsError, match=r"text\.db"):
        Registry.open(f"sqlite:///{tmp_path}/text.db/registry.db")
    with pytest.raises(SettingsError, match="not usable"):
        Registry.open(f"sqlite:///{tmp_path}")


def test_a_full_disk_changes_nothing(registry: Registry, on_connections: Callable[[str], None]) -> None:
    first = registry.publish(router="r", note="")
    on_connections("PRAGMA max_page_count = 1")
    with pytest.raises(NoSpace):
        registry.publish(note="x" * 100_000)
    assert registry.live() == first
    assert registry.releases() == (first,)


def test_a_writer_that_does_not_let_go_is_retryable(
    registry: Registry, file: Path, on_connections: Callable[[str], None]
) -> None:
    first = registry.publish(router="r", note="")
    on_connections("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Overloaded) as caught:
        registry.publish(note="")
    assert caught.value.retryable
    assert registry.live() == first, "readers go on beside a writer"
    other.close()
    assert registry.publish(note="").id == 2
