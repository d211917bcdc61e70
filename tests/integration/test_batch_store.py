"""Batches and the requests that make them on PostgreSQL: counters, cursors, twins."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.job import BatchStatus, InputError
from service.domain.usage import Usage
from service.errors import InvalidRequest, NotFound
from service.ports import Database
from tests.integration.stored import stored, together


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
