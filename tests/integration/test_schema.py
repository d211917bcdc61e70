"""Migrations: from empty to head, in agreement with the tables, and what the database itself refuses."""

from __future__ import annotations

import threading

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from service.adapters import schema
from service.adapters.postgres import sqlalchemy_url
from service.adapters.tables import metadata
from service.embedded import Endpoints

LEDGER = ("ledger_transactions", "ledger_entries", "prices", "price_books")


def test_models_and_migrations_agree(owner_url: str) -> None:
    engine = sa.create_engine(sqlalchemy_url(owner_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_upgrades_at_once_run_one_after_the_other(servers: Endpoints) -> None:
    with psycopg.connect(servers.migration_database_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE twice")
    url = servers.migration_database_url.replace("/longdraft?", "/twice?")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(schema.upgrade(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [schema.head()] * 3
    assert schema.state(url) == (schema.head(), schema.head())


def test_down_and_up_again(owner_url: str) -> None:
    engine = sa.create_engine(sqlalchemy_url(owner_url))
    with engine.begin() as connection:
        config = schema._config()
        config.attributes["connection"] = connection
        schema.command.downgrade(config, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()
    assert schema.upgrade(owner_url) == schema.head()


@pytest.mark.parametrize("table", LEDGER)
@pytest.mark.parametrize("statement", ["UPDATE {} SET {} = {}", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_runtime_role_has_no_grant_to_rewrite_money(database_url: str, table: str, statement: str) -> None:
    column = {"ledger_transactions": "model", "ledger_entries": "account", "prices": "input", "price_books": "version"}[table]
    with psycopg.connect(database_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.format(table, column, column))


@pytest.mark.parametrize("statement", ["UPDATE prices SET input = 1", "DELETE FROM prices", "TRUNCATE price_books CASCADE"])
def test_even_the_owner_cannot_rewrite_money(owner_url: str, statement: str) -> None:
    with psycopg.connect(owner_url) as connection, pytest.raises(psycopg.errors.RestrictViolation):
        connection.execute(statement)
