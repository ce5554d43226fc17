"""Opening the registry's database: where it is, its rules of locking, its migrations, and what its errors mean."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from ..errors import ArtifactCorrupt, CollegiumError, DatabaseTooNew, NoSpace, Overloaded, SettingsError
from .tables import HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

_WRITING = "collegium_writing"  # the execution option of such connections
_BUSY = "PRAGMA busy_timeout = 30000"  # milliseconds
_ADVISORY = 0x636F6C6C  # PostgreSQL's lock for migrations: any number that is always the same
_ALEMBIC = threading.Lock()  # its `op` and `context` are global to the process


def open_database(url: str) -> Engine:
    """Open a database and bring its schema to this version's; an empty one gets its tables.

    Raises SettingsError for a URL that cannot be used, and DatabaseTooNew.
    """
    engine = _engine(url)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        stack.enter_context(translated())
        with _one_at_a_time(engine.url), writing(engine) as connection:
            _migrate(connection)
        stack.pop_all()
    return engine


def writing(engine: Engine) -> AbstractContextManager[Connection]:
    """Begin a transaction that will write; it is committed at the end of the block."""
    return engine.execution_options(**{_WRITING: True}).begin()


@contextmanager
def translated() -> Iterator[None]:
    """Turn the database errors that a user can do something about into ours."""
    try:
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None) or ""
        ours = _explain(code, str(error.orig))
        if ours is None:
            raise
        raise ours from error


def _explain(code: str, detail: str) -> CollegiumError | None:
    match code.split("_"):
        case ["SQLITE", "FULL", *_] | ["53100"]:
            return NoSpace("No space is left for the registry's database.", hint="Free some space, then try again.")
        case ["SQLITE", "BUSY", *_] | ["55P03"]:
            return Overloaded("Another process is writing to the registry.", hint="Try again in a moment.")
        case ["SQLITE", "CORRUPT" | "NOTADB", *_]:
            return ArtifactCorrupt(f"The registry's database is damaged: {detail}.", hint="Restore it from a backup.")
        case ["SQLITE", "CANTOPEN" | "READONLY", *_]:
            return SettingsError(
                f"The registry's database is not usable: {detail}.", hint="Check database_url and home."
            )
    return None


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
            raise SettingsError(f"database_url is for {parsed.get_backend_name()}.", hint="Use sqlite or postgresql.")
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        return create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, ModuleNotFoundError, OSError) as error:
        raise SettingsError(
            f"database_url cannot be used: {error}.", hint="Such as sqlite:////path/to/file."
        ) from error


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise SettingsError("database_url must name a file.", hint="Such as sqlite:////path/to/registry.db.")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        # WAL lets readers go on beside a writer; FULL keeps what was acknowledged even when the power fails.
        connection.isolation_level = None  # `begin` below begins, not the driver
        cursor = connection.cursor()
        for rule in (_BUSY, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON"):
            cursor.execute(rule)
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A reader that turns writer fails at once when another wrote in between; IMMEDIATE waits for its turn.
        will_write = connection.get_execution_options().get(_WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if will_write else "BEGIN")

    return engine


def _one_at_a_time(url: URL) -> AbstractContextManager[object]:
    """SQLite's first switch to WAL does not wait for its lock, so that processes which open a new file take turns."""
    return FileLock(f"{url.database}.lock") if url.get_backend_name() == "sqlite" else nullcontext()


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY)))
    revision = _revision(connection)
    if revision == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", f"{__package__}:migrations")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise DatabaseTooNew(
            f"The registry's database has the schema {revision}, this version of Collegium knows up to {HEAD}.",
            hint="Upgrade Collegium, or set database_url to another database.",
        )
    with _ALEMBIC:
        command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
