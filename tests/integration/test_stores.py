"""Accounts, files, batches, outbox and workers on PostgreSQL: owners, cursors, counters, fences."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from service.adapters.unit_of_work import PostgresDatabase
from service.domain.account import ApiKey, File, FilePurpose
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch, BatchStatus, InputError
from service.domain.line import StagedLine
from service.domain.usage import Usage
from service.errors import Conflict, InvalidRequest, LeaseLost, NotFound, Unavailable
from service.ports import Database, OutboxKind, WorkerRow

LEASE = timedelta(seconds=60)
AT = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def db(module_database: Database) -> Database:
    return module_database


@pytest.fixture
def project(db: Database) -> str:
    with db.begin() as uow:
        return uow.accounts.add_project(uuid4().hex).id


def a_file(project_id: str, **changes) -> File:
    file_id = new_file_id()
    return replace(File(file_id, project_id, FilePurpose.BATCH, "in.jsonl", 3, "00" * 32, f"files/{file_id}/in", AT), **changes)


def a_batch(project_id: str, file: File, **changes) -> Batch:
    batch = Batch(new_batch_id(), project_id, "/v1/chat/completions", "24h", AT, AT + timedelta(days=1), 1, input_file_id=file.id)
    return replace(batch, **changes)


def stored(db: Database, project_id: str, **changes) -> Batch:
    file = a_file(project_id)
    batch = a_batch(project_id, file, **changes)
    with db.begin() as uow:
        uow.files.add(file)
        uow.batches.add(batch)
    return batch


# --- accounts -----------------------------------------------------------------------------------------------------------------


def test_a_project_name_is_taken_once(db: Database) -> None:
    name = uuid4().hex
    with db.begin() as uow:
        uow.accounts.add_project(name)
    with db.begin() as uow, pytest.raises(Conflict, match=name):
        uow.accounts.add_project(name)


def test_keys_by_prefix_are_the_live_ones_and_a_use_is_noted_once_a_minute(db: Database, project: str) -> None:
    first, second = (ApiKey(uuid4().hex, project, "n", "ld-abc", uuid4().bytes, AT, ("read",)) for _ in range(2))
    with db.begin() as uow:
        uow.accounts.add_key(first)
        uow.accounts.add_key(second)
    with db.begin() as uow:
        assert uow.accounts.revoke_key(first.id)
        assert not uow.accounts.revoke_key(first.id)
        (live,) = uow.accounts.keys_with_prefix("ld-abc")
        assert (live.id, live.digest, live.scopes) == (second.id, second.digest, ("read",))
        uow.accounts.touch_key(second.id)
    with db.begin() as uow:
        used = {key.id: key.last_used_at for key in uow.accounts.keys(project)}
        uow.accounts.touch_key(second.id)
        assert {key.id: key.last_used_at for key in uow.accounts.keys(project)} == used
    assert used[first.id] is None
    assert used[second.id] is not None


# --- files --------------------------------------------------------------------------------------------------------------------


def test_files_of_others_and_files_that_are_gone_look_alike(db: Database, project: str) -> None:
    mine, deleted, expired = a_file(project), a_file(project), a_file(project, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    with db.begin() as uow:
        for file in (mine, deleted, expired):
            uow.files.add(file)
        assert uow.files.delete(project, deleted.id)
        assert not uow.files.delete(project, deleted.id)
        assert not uow.files.delete("proj_default", mine.id)
        assert uow.files.get(project, mine.id) == mine
        assert [uow.files.get(*ids) for ids in ((project, deleted.id), (project, expired.id), ("proj_default", mine.id))] == [None] * 3


def test_file_pages_walk_both_ways_and_over_a_deleted_cursor(db: Database, project: str) -> None:
    files = [a_file(project, purpose=FilePurpose.BATCH_OUTPUT if number == 2 else FilePurpose.BATCH) for number in range(5)]
    with db.begin() as uow:
        for file in files:
            uow.files.add(file)

    def walk(*, ascending: bool, purpose: FilePurpose | None = None) -> list[str]:
        found: list[str] = []
        while True:
            with db.begin() as uow:
                page = uow.files.page(project, after=found[-1] if found else None, limit=2, ascending=ascending, purpose=purpose)
            found += [file.id for file in page.items]
            if not page.has_more:
                return found

    ids = [file.id for file in files]
    assert walk(ascending=True) == ids
    assert walk(ascending=False) == ids[::-1]
    assert walk(ascending=True, purpose=FilePurpose.BATCH) == [id for id in ids if id != ids[2]]
    with db.begin() as uow:
        uow.files.delete(project, ids[1])
        page = uow.files.page(project, after=ids[1], limit=10, ascending=True, purpose=None)
        assert [file.id for file in page.items] == ids[2:]
        with pytest.raises(InvalidRequest):
            uow.files.page("proj_default", after=ids[0], limit=10, ascending=True, purpose=None)


def test_objects_go_when_no_open_batch_reads_them(db: Database, project: str) -> None:
    batch = stored(db, project)
    assert batch.input_file_id is not None
    with db.begin() as uow:
        file = uow.files.get(project, batch.input_file_id)
        assert file is not None
        assert uow.files.in_use(file.id)
        uow.files.delete(project, file.id)
        assert file.storage_key not in uow.garbage.unreferenced_keys(1000)
        uow.batches.save(batch.to(BatchStatus.FAILED, uow.now))
        assert not uow.files.in_use(file.id)
        assert file.storage_key in uow.garbage.unreferenced_keys(1000)
        uow.garbage.forget_keys([file.storage_key])
        assert file.storage_key not in uow.garbage.unreferenced_keys(1000)


# --- batches ------------------------------------------------------------------------------------------------------------------


def test_a_batch_comes_back_as_it_went(db: Database, project: str) -> None:
    values = {
        "metadata": {"a": "ü"},
        "priority": 9,
        "max_cost": 10**30,
        "request_digest": b"\0\1",
        "errors": (InputError("invalid_json_line", "…", 3), InputError("empty_file", "…")),
        "model": "m",
        "output_expires_after": 3600,
    }
    batch = stored(db, project, **values)
    with db.begin() as uow:
        assert uow.batches.get(project, batch.id) == batch
        assert uow.batches.load(batch.id, lock=True) == batch
        assert uow.batches.get("proj_default", batch.id) is None
        with pytest.raises(NotFound):
            uow.batches.load("batch_unknown")


def test_counters_move_by_count_alone_and_no_increment_is_lost(db: Database, project: str) -> None:
    batch = stored(db, project, total=100)
    numbers: list[int] = []

    def add() -> None:
        for _ in range(5):
            with db.begin() as uow:
                numbers.append(uow.batches.count(batch.id, completed=1, failed=2, usage=Usage(3, 1, 2, 0)))

    together(add, add, add)
    with db.begin() as uow:
        uow.batches.save(batch.evolve(priority=3))  # a copy from before: it must not turn the counters back
        now = uow.batches.load(batch.id)
    assert sorted(numbers) == list(range(1, 16))
    assert (now.completed, now.failed, now.usage, now.commit_no, now.priority) == (15, 30, Usage(45, 15, 30, 0), 15, 3)


def test_batch_pages_are_newest_first(db: Database, project: str) -> None:
    ids = [stored(db, project).id for _ in range(3)][::-1]
    with db.begin() as uow:
        first = uow.batches.page(project, after=None, limit=2)
        rest = uow.batches.page(project, after=ids[1], limit=2)
        with pytest.raises(InvalidRequest):
            uow.batches.page("proj_default", after=ids[0], limit=2)
    assert ([batch.id for batch in first.items], first.has_more) == (ids[:2], True)
    assert ([batch.id for batch in rest.items], rest.has_more) == (ids[2:], False)


def test_overdue_are_the_open_ones_past_their_expiry(db: Database, project: str) -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    late, ended = stored(db, project, expires_at=past), stored(db, project, expires_at=past, status=BatchStatus.COMPLETED)
    early = stored(db, project)
    with db.begin() as uow:
        overdue = uow.batches.overdue(1000)
    assert late.id in overdue
    assert not {ended.id, early.id} & set(overdue)


def test_creates_of_the_same_body_wait_for_each_other(db: Database, project: str) -> None:
    order: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with db.begin() as uow:
            uow.requests.lock(project, b"digest")
            entered.set()
            leave.wait(20)
            order.append("first")

    def second() -> None:
        entered.wait(20)
        with db.begin() as uow:
            uow.requests.lock(project, b"another")  # does not wait
            leave.set()
            uow.requests.lock(project, b"digest")
            order.append("second")

    together(first, second)
    assert order == ["first", "second"]


def test_twins_are_told_by_key_body_and_age(db: Database, project: str) -> None:
    old = stored(db, project, request_digest=b"same", created_at=datetime(2020, 1, 1, tzinfo=UTC))
    day = timedelta(days=1)
    with db.begin() as uow:
        assert uow.requests.recent_twin(project, None, b"same", day) is None, old.id
    twin = stored(db, project, request_digest=b"same")
    with db.begin() as uow:
        assert uow.requests.recent_twin(project, None, b"same", day) == twin.id
        assert uow.requests.recent_twin(project, "another key", b"same", day) is None
        assert uow.requests.recent_twin(project, None, b"other", day) is None
        uow.requests.remember(project, "idem", b"same", twin.id)
        assert uow.requests.by_key(project, "idem") == (b"same", twin.id)
        assert uow.requests.by_key("proj_default", "idem") is None


# --- outbox -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outbox(database: PostgresDatabase) -> PostgresDatabase:
    """A database of this test's own: claims take whatever is due."""
    return database


def test_one_open_item_says_it_all(outbox: Database) -> None:
    with outbox.begin() as uow:
        for _ in range(2):
            uow.outbox.add(OutboxKind.WAKE, payload={"model": "a"})
        uow.outbox.add(OutboxKind.WAKE, payload={"model": "b"})
        assert uow.outbox.open_items() == 2
        for item in uow.outbox.claim("me", kinds=[OutboxKind.WAKE], lease=LEASE, limit=10):
            uow.outbox.done(item)
        uow.outbox.add(OutboxKind.WAKE, payload={"model": "a"})
        assert uow.outbox.open_items() == 1


def test_claimers_at_once_share_and_never_wait(outbox: Database) -> None:
    with outbox.begin() as uow:
        for number in range(4):
            uow.outbox.add(OutboxKind.WAKE, payload={"model": str(number)})
    with outbox.begin() as one, outbox.begin() as other:
        first = one.outbox.claim("one", kinds=[OutboxKind.WAKE], lease=LEASE, limit=3)
        second = other.outbox.claim("other", kinds=[OutboxKind.WAKE, OutboxKind.VALIDATE], lease=LEASE, limit=3)
    assert [item.payload["model"] for item in (*first, *second)] == ["0", "1", "2", "3"]
    with outbox.begin() as uow:
        assert uow.outbox.claim("third", kinds=list(OutboxKind), lease=LEASE, limit=3) == []


def test_who_lost_the_lease_can_do_nothing_more(outbox: Database) -> None:
    with outbox.begin() as uow:
        uow.outbox.add(OutboxKind.WAKE, payload={"model": "a"})
        (zombie,) = uow.outbox.claim("zombie", kinds=[OutboxKind.WAKE], lease=timedelta(seconds=-1), limit=1)
    with outbox.begin() as uow:
        (heir,) = uow.outbox.claim("heir", kinds=[OutboxKind.WAKE], lease=LEASE, limit=1)
    assert (heir.id, heir.token, heir.attempts) == (zombie.id, zombie.token + 1, 2)
    with outbox.begin() as uow:
        assert not uow.outbox.renew(zombie, LEASE)
        for refused in (uow.outbox.hold, uow.outbox.done):
            with pytest.raises(LeaseLost):
                refused(zombie)
        uow.outbox.retry(zombie, error="late", delay=timedelta(0))
        uow.outbox.hold(heir)
        assert uow.outbox.renew(heir, LEASE)
        uow.outbox.done(heir)
        with pytest.raises(LeaseLost):
            uow.outbox.hold(heir)


def test_a_retry_comes_back_after_its_delay(outbox: Database) -> None:
    with outbox.begin() as uow:
        uow.outbox.add(OutboxKind.WAKE, payload={"model": "a"})
        (item,) = uow.outbox.claim("me", kinds=[OutboxKind.WAKE], lease=LEASE, limit=1)
        uow.outbox.retry(item, error="boom", delay=timedelta(hours=1))
    with outbox.begin() as uow:
        assert uow.outbox.claim("me", kinds=[OutboxKind.WAKE], lease=LEASE, limit=1) == []
        assert uow.outbox.open_items() == 1


# --- workers ------------------------------------------------------------------------------------------------------------------


def test_workers_live_until_they_stop_or_fall_silent(db: Database) -> None:
    worker = f"w-{uuid4().hex}"
    with db.begin() as uow:
        uow.workers.register(worker, host="h", pid=1, device="cpu")
        row = uow.workers.get(worker)
        assert isinstance(row, WorkerRow)
        uow.workers.beat(replace(row, model="m", busy_ns=5, tokens_per_second=1.5))
    with db.begin() as uow:
        (live,) = (row for row in uow.workers.live(timedelta(minutes=1)) if row.id == worker)
        assert (live.model, live.busy_ns, live.tokens_per_second) == ("m", 5, 1.5)
        assert worker not in {row.id for row in uow.workers.live(timedelta(0))}
        uow.workers.stop(worker)
        assert worker not in {row.id for row in uow.workers.live(timedelta(minutes=1))}
        uow.workers.register(worker, host="h", pid=2, device="cpu")
        assert worker in {row.id for row in uow.workers.live(timedelta(minutes=1))}


# --- transactions -------------------------------------------------------------------------------------------------------------


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


def test_a_connection_cut_inside_a_transaction_is_an_outage_and_the_pool_recovers(database: PostgresDatabase, owner_url: str) -> None:
    with pytest.raises(Unavailable), database.begin() as uow:  # noqa: PT012 - the transaction is the point
        uow.accounts.projects()
        _cut_connections(owner_url)
        uow.accounts.projects()
    with database.begin() as uow:
        assert uow.accounts.projects()


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


def together(*parts: Callable[[], None]) -> None:
    """Runs them in threads and passes on the first failure."""
    failed: list[BaseException] = []

    def guard(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    threads = [threading.Thread(target=guard, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


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
