"""Migrations, run from code: the schema from wherever it is to head."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import migrations
from service.adapters.postgres import advisory_key, sqlalchemy_url
from service.errors import Unavailable


def upgrade(url: str, revision: str = "head") -> str:
    """Brings the schema to `revision` and returns it. Two upgrades at once run one after the other (advisory lock).

    Raises:
        Unavailable: the database does not answer.
    """
    engine = sa.create_engine(sqlalchemy_url(url), poolclass=sa.NullPool, connect_args={"connect_timeout": 10})
    try:
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(advisory_key("longdraft.migrations"))))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            return current_revision(connection) or ""
    except sa.exc.OperationalError as error:
        raise Unavailable(f"The database does not answer: {error.orig}") from error
    finally:
        engine.dispose()


def current_revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def state(url: str) -> tuple[str | None, str]:
    """(the database's revision, the newest this version knows): equal when nothing needs an upgrade."""
    engine = sa.create_engine(sqlalchemy_url(url), poolclass=sa.NullPool, connect_args={"connect_timeout": 10})
    try:
        with engine.connect() as connection:
            return current_revision(connection), head()
    except sa.exc.OperationalError as error:
        raise Unavailable(f"The database does not answer: {error.orig}") from error
    finally:
        engine.dispose()


def head() -> str:
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config
