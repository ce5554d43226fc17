"""Cards, releases, and the pointer to the live one."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables, and the pointer's one row."""
    op.create_table(
        "cards",
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("domain", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_cards"),
    )
    op.create_table(
        "releases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["parent"], ["releases.id"], name="fk_releases_parent"),
        sa.PrimaryKeyConstraint("id", name="pk_releases"),
        sqlite_autoincrement=True,
    )
    live = op.create_table(
        "live",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("release", sa.Integer(), nullable=True),
        sa.CheckConstraint("id = 1", name="ck_live_single"),
        sa.ForeignKeyConstraint(["release"], ["releases.id"], name="fk_live_release"),
        sa.PrimaryKeyConstraint("id", name="pk_live"),
    )
    op.bulk_insert(live, [{"id": 1, "release": None}])
