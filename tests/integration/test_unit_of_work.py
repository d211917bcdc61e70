"""Transactions on PostgreSQL: what is undone, who waits for whom, and outages."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from service.adapters.unit_of_work import PostgresDatabase
from service.domain.line import StagedLine
from service.errors import Unavailable
from service.ports import Database
from tests.integration.stored import a_batch, a_file, stored, together


def test_a_block_that_raises_leaves_nothing(db: Database) -> None:
    name = uuid4().hex
    with pytest.raises(KeyError), db.begin() as uow:  # noqa: PT012 - the transaction is the point
        uow.accounts.add_project(name)
        raise KeyError
    with db.begin() as uow:
        assert name not in {project.name for project in uow.accounts.projects()}


def test_an_advisory_lock_is_held_until_the_transaction_ends(db: Database) -> None:
    with db.begin() as one:
        assert one.try_lock("sweep")
        with db.begin() as other:
            assert not other.try_lock("sweep")
            assert other.try_lock("another")
    with db.begin() as uow:
        assert uow.try_lock("sweep")


def test_a_deadlock_asks_to_try_again(db: Database, project: str) -> None:
    first, second = stored(db, project), stored(db, project)
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def lock(*ids: str) -> Callable[[], None]:
        def run() -> None:
            try:
                with db.begin() as uow:
                    uow.batches.load(ids[0], lock=True)
                    barrier.wait(20)
                    uow.batches.load(ids[1], lock=True)
                outcomes.append("done")
            except Unavailable:
                outcomes.append("again")

        return run

    together(lock(first.id, second.id), lock(second.id, first.id))
    assert sorted(outcomes) == ["again", "done"]


def test_a_stream_left_half_read_by_an_exception_never_disturbs_a_later_transaction(database_url: str) -> None:
    """Its cursor is closed with its transaction, not when the generator is collected, on whatever the connection does by then."""
    one_connection = PostgresDatabase(database_url, pool_size=1)
    kept = []

    def interrupted(uow: Any) -> None:
        (project,) = uow.accounts.projects()
        file = a_file(project.id)
        batch = a_batch(project.id, file)
        uow.files.add(file)
        uow.batches.add(batch)
        uow.lines.stage(batch.id, [StagedLine(n, 0, 1, f"line-{n}", model="m") for n in range(1, 5001)])
        kept.append(uow.lines.for_grouping(batch.id))
        next(kept[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), one_connection.begin() as uow:
        interrupted(uow)
    with one_connection.begin() as uow:
        kept.clear()
        gc.collect()
        assert uow.accounts.projects()
    one_connection.close()


def test_a_connection_cut_inside_a_transaction_is_an_outage_and_the_pool_recovers(database: PostgresDatabase, owner_url: str) -> None:
    with pytest.raises(Unavailable), database.begin() as uow:  # noqa: PT012 - the transaction is the point
        uow.accounts.projects()
        _cut_connections(owner_url)
        uow.accounts.projects()
    with database.begin() as uow:
        assert uow.accounts.projects()


def test_locks_of_a_process_that_falls_silent_are_free_after_a_while(database_url: str, database: PostgresDatabase) -> None:
    silent = PostgresDatabase(database_url, patience=0.5)
    batch = stored(database, _a_project(database))
    with pytest.raises(Unavailable, match="idle-in-transaction"), silent.begin() as uow:  # noqa: PT012 - the transaction is the point
        uow.batches.load(batch.id, lock=True)
        with database.begin() as other:
            other.batches.load(batch.id, lock=True)  # waits until the server has ended the first transaction
        uow.batches.load(batch.id)
    silent.ping()
    silent.close()


def test_who_streams_rows_may_be_silent_for_longer(database_url: str, database: PostgresDatabase) -> None:
    """Between two reads they go to an object store, however slow."""
    silent = PostgresDatabase(database_url, patience=0.5)
    batch = stored(database, _a_project(database))
    with database.begin() as uow:
        uow.lines.stage(batch.id, [StagedLine(n, 0, 1, f"line-{n}", model="m") for n in range(1, 3001)])
    with silent.begin() as uow:
        rows = uow.lines.for_grouping(batch.id)
        next(rows)
        time.sleep(1.2)
        assert sum(1 for _ in rows) == 2999
    silent.close()


def _a_project(database: PostgresDatabase) -> str:
    with database.begin() as uow:
        return uow.accounts.projects()[0].id


def test_a_crash_of_the_server_is_an_outage_and_the_pool_recovers(database: PostgresDatabase, owner_url: str) -> None:
    """One killed backend makes PostgreSQL throw everybody out and recover from its log."""
    database.ping()
    witness = psycopg.connect(owner_url, autocommit=True)
    with psycopg.connect(owner_url) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
    with pytest.raises(psycopg.OperationalError):
        _ask_until_thrown_out(witness)  # the server may be too busy to notice at once
    failures = 0
    while True:
        try:
            with database.begin() as uow:
                assert uow.accounts.projects()
            break
        except Unavailable:
            failures += 1
            assert failures < 1000


def _ask_until_thrown_out(connection: psycopg.Connection) -> None:
    while True:
        connection.execute("SELECT 1")


def _cut_connections(owner_url: str) -> None:
    with psycopg.connect(owner_url, autocommit=True) as connection:
        mine = "pid <> pg_backend_pid() AND datname = current_database()"
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")
