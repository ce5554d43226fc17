"""The registry's tables. A change here needs a migration beside it in `migrations/versions/` and a new `HEAD`."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

HEAD = "0003"
"""The newest migration's revision, so that opening an up-to-date database need not load Alembic."""

metadata = MetaData(
    naming_convention={  # names that later migrations can refer to, the same on every database
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

cards = Table(
    "cards",
    metadata,
    Column("version", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("domain", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created", String, nullable=False),
)
"""`body` is `schema.card_to_dict`; `created` (here and below) is ISO 8601 in UTC."""

releases = Table(
    "releases",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("body", JSON, nullable=False),
    Column("parent", Integer, ForeignKey("releases.id")),
    Column("note", Text, nullable=False),
    Column("created", String, nullable=False),
    sqlite_autoincrement=True,  # an id is never given twice, as PostgreSQL has it anyway
)
"""`body` holds `aliases`, `router` and `indexes`."""

live = Table(
    "live",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True, autoincrement=False),
    Column("release", Integer, ForeignKey("releases.id")),
)
"""The pointer. Its one row exists from the first migration on, so that writers have something to lock."""

decisions = Table(
    "decisions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("created", String, nullable=False),
    Column("prompt_hash", String, nullable=False),
    Column("embedding", LargeBinary, nullable=False),
    Column("encoder", String, nullable=False),
    Column("release", Integer, nullable=False),
    Column("router", String, nullable=False),
    Column("domain", String),
    Column("expert", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("confidence", Float, nullable=False),
    Column("body", JSON, nullable=False),
    Column("text", Text),
    Index("ix_decisions_created", "created"),
)
"""A log, so `release` is no foreign key: what was decided outlives what decided it. `prompt_hash` is SHA-256 of the text that
was routed, `embedding` little-endian float16; `body` holds the rest of the decision."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("turn", Integer, nullable=False),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("stage", String, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("loss", Float),
    Column("eta", Float),
    Column("error", Text),
    Column("report", JSON, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("cancel", Boolean, nullable=False),
    Column("worker", Integer),
    Column("created", String, nullable=False),
    Column("started", String),
    Column("ended", String),
    Index("ix_jobs_state_turn", "state", "turn"),
)
"""Long pieces of work, as `schema.JobState` has them. `turn` is the place in the queue; `cancel` says that somebody asked for its
end; `worker` is the process that works on it, for people to look at: nothing is decided by it, since numbers are given again."""
