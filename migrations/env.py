"""Alembic's entry: always on the connection that service.adapters.schema opened."""

from __future__ import annotations

from alembic import context

from service.adapters.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
