"""Migrations: from empty to head, in agreement with the tables, and what the database itself refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from service.adapters import schema
from service.adapters.postgres import sqlalchemy_url
from service.adapters.tables import metadata
from service.embedded import Endpoints
from service.errors import Unavailable

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


LINE = (
    "INSERT INTO ledger_transactions (project_id, batch_id, line_no, kind, model, price_version)"
    " VALUES ('proj_default', 'batch_1', {}, 'charge', 'm', 1) RETURNING id"
)
LEG = "INSERT INTO ledger_entries (transaction_id, leg, account, amount) VALUES "


@pytest.fixture
def charged(database_url: str) -> Iterator[psycopg.Connection]:
    """The runtime role's connection, inside a transaction with a batch to charge."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO files (id, project_id, purpose, filename, bytes, sha256, storage_key)"
            " VALUES ('file_1', 'proj_default', 'batch', 'f', 1, '', 'k')"
        )
        connection.execute(
            "INSERT INTO batches"
            " (id, project_id, status, endpoint, completion_window, input_file_id, on_invalid_line, price_version, expires_at)"
            " VALUES ('batch_1', 'proj_default', 'in_progress', 'e', '24h', 'file_1', 'fail', 1, now())"
        )
        yield connection
        connection.rollback()


def transaction_of(connection: psycopg.Connection, line: int) -> int:
    row = connection.execute(LINE.format(line)).fetchone()
    assert row is not None
    return int(row[0])


def test_legs_that_sum_to_zero_are_taken_at_any_size(charged: psycopg.Connection) -> None:
    one, two = transaction_of(charged, 1), transaction_of(charged, 2)
    charged.execute(
        f"{LEG} ({one}, 0, 'a', {10**37}), ({one}, 1, 'b', {-(10**37)}), ({two}, 0, 'a', 1), ({two}, 1, 'a', 2), ({two}, 2, 'b', -3)"
    )


@pytest.mark.parametrize(
    "legs", ["({one}, 0, 'a', 1)", "({one}, 0, 'a', 1), ({one}, 1, 'b', -2)", "({one}, 0, 'a', 5), ({two}, 0, 'b', -5)"]
)
def test_legs_that_do_not_are_refused(charged: psycopg.Connection, legs: str) -> None:
    one, two = transaction_of(charged, 1), transaction_of(charged, 2)
    with pytest.raises(psycopg.errors.CheckViolation, match="do not sum to zero"):
        charged.execute(LEG + legs.format(one=one, two=two))


def test_a_line_is_charged_once(charged: psycopg.Connection) -> None:
    transaction_of(charged, 1)
    with pytest.raises(psycopg.errors.UniqueViolation):
        transaction_of(charged, 1)


def test_delivered_lines_are_not_rewritten(owner_url: str, database_url: str) -> None:
    with psycopg.connect(owner_url) as connection, pytest.raises(psycopg.errors.RestrictViolation):
        connection.execute("UPDATE line_results SET outcome = 'failed'")
    with psycopg.connect(database_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("UPDATE line_results SET outcome = 'failed'")


def test_an_owner_without_any_rights_beyond_its_database_can_migrate(servers: Endpoints) -> None:
    """As on a hosted PostgreSQL: no superuser, no roles to be made. Then nothing is granted, and the owner is the runtime role."""
    admin = servers.migration_database_url
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("CREATE ROLE modest LOGIN PASSWORD 'modest'")
        connection.execute("CREATE DATABASE hosted OWNER modest")
        connection.execute("ALTER ROLE longdraft_runtime RENAME TO elsewhere")
        try:
            split = urlsplit(admin)
            url = urlunsplit(split._replace(netloc="modest:modest@", path="/hosted"))
            assert schema.upgrade(url) == schema.head()
            with psycopg.connect(url) as modest, pytest.raises(psycopg.errors.RestrictViolation):
                modest.execute("DELETE FROM prices")
        finally:
            connection.execute("ALTER ROLE elsewhere RENAME TO longdraft_runtime")


def test_no_server_is_an_outage(tmp_path: Path) -> None:
    nowhere = f"postgresql://nobody@/nothing?host={tmp_path}"
    for use in (schema.upgrade, schema.state):
        with pytest.raises(Unavailable, match="does not answer"):
            use(nowhere)
