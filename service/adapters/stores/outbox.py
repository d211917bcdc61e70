"""The control process's work list: rows that were promised in the transaction that made them due, leased and fenced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from service.adapters.tables import outbox
from service.errors import LeaseLost
from service.ports import OutboxItem, OutboxKind

_OPEN = outbox.c.done_at.is_(None)


class OutboxRows:
    """ports.Outbox on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, kind: OutboxKind, *, batch_id: str | None = None, payload: Mapping[str, Any] | None = None) -> None:
        statement = insert(outbox).values(kind=kind.value, batch_id=batch_id, payload=dict(payload or {}))
        # The partial unique index uq_outbox_open: an open item that says the same already promises this.
        self._connection.execute(statement.on_conflict_do_nothing())

    def claim(self, owner: str, *, kinds: Collection[OutboxKind], lease: timedelta, limit: int) -> Sequence[OutboxItem]:
        free = or_(outbox.c.lease_until.is_(None), outbox.c.lease_until < func.now())
        due = and_(_OPEN, free, outbox.c.not_before <= func.now(), outbox.c.kind.in_([kind.value for kind in kinds]))
        picked = select(outbox.c.id).where(due).order_by(outbox.c.not_before, outbox.c.id).limit(limit).with_for_update(skip_locked=True)
        statement = (
            update(outbox)
            .where(outbox.c.id.in_(picked.scalar_subquery()))
            .values(token=outbox.c.token + 1, owner=owner, lease_until=func.now() + lease, attempts=outbox.c.attempts + 1)
            .returning(outbox.c.id, outbox.c.kind, outbox.c.batch_id, outbox.c.payload, outbox.c.token, outbox.c.attempts)
        )
        rows = self._connection.execute(statement)
        items = [OutboxItem(row.id, OutboxKind(row.kind), row.batch_id, row.payload, row.token, row.attempts) for row in rows]
        return sorted(items, key=lambda item: item.id)

    def renew(self, item: OutboxItem, lease: timedelta) -> bool:
        return self._set(item, lease_until=func.now() + lease)

    def hold(self, item: OutboxItem) -> None:
        query = select(outbox.c.id).where(*_mine(item)).with_for_update()
        if self._connection.execute(query).one_or_none() is None:
            raise LeaseLost(f"Outbox item {item.id} ({item.kind.value}) is no longer held with token {item.token}.")

    def done(self, item: OutboxItem) -> None:
        if not self._set(item, done_at=func.now(), lease_until=None, owner=None):
            raise LeaseLost(f"Outbox item {item.id} ({item.kind.value}) is no longer held with token {item.token}.")

    def retry(self, item: OutboxItem, *, error: str, delay: timedelta) -> None:
        self._set(item, lease_until=None, owner=None, last_error=error[:2000], not_before=func.now() + delay)

    def open_items(self) -> int:
        return int(self._connection.execute(select(func.count()).select_from(outbox).where(_OPEN)).scalar_one())

    def _set(self, item: OutboxItem, **values: Any) -> bool:
        return self._connection.execute(update(outbox).where(*_mine(item)).values(values)).rowcount > 0


def _mine(item: OutboxItem) -> tuple[Any, ...]:
    return outbox.c.id == item.id, outbox.c.token == item.token, _OPEN
