"""Alembic runs this file to migrate, on the connection and in the transaction that `database.py` hands it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
