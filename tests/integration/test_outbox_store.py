"""The outbox on PostgreSQL: who claims an item, who has lost it, and when it comes back."""

from __future__ import annotations

from datetime import timedelta

import pytest

from service.adapters.unit_of_work import PostgresDatabase
from service.errors import LeaseLost
from service.ports import Database, OutboxKind

LEASE = timedelta(seconds=60)


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
