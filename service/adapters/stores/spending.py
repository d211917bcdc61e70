"""Caps on what a batch may cost: what is charged, and what running lines may still cost at worst.

The row of `spending` is locked after everything else (groups, batches), so reserving never holds up a commit for longer than a statement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Integer, Numeric, any_, cast, delete, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert

from service.adapters.tables import batches, groups, reservations, spending
from service.billing.spending import reserve
from service.domain.money import Reservation, Reserved
from service.errors import NotFound


class Spending:
    """ports.SpendingStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def reserve(self, batch_id: str, wanted: Sequence[Reservation]) -> Reserved:
        cap, charged = self._lock(batch_id)
        if cap is None:
            return Reserved(frozenset(r.line_no for r in wanted), frozenset(), frozenset())
        self._release_stale(batch_id)
        ours = reservations.c.line_no == any_(literal([r.line_no for r in wanted], ARRAY(Integer)))
        others = select(func.coalesce(func.sum(reservations.c.amount), 0)).where(reservations.c.batch_id == batch_id, ~ours)
        held = int(self._connection.execute(others).scalar_one())
        answer = reserve(wanted, cap=cap, charged=charged, held=held)
        rows = [
            {"batch_id": batch_id, "line_no": r.line_no, "group_id": r.group_id, "token": r.token, "amount": r.amount}
            for r in wanted
            if r.line_no in answer.granted
        ]
        if rows:
            statement = upsert(reservations)
            new = {name: statement.excluded[name] for name in ("group_id", "token", "amount")}
            self._connection.execute(statement.on_conflict_do_update(index_elements=["batch_id", "line_no"], set_=new), rows)
        return answer

    def room(self, batch_id: str) -> int | None:
        cap, charged = self._lock(batch_id)
        return None if cap is None else cap - charged

    def settle(self, batch_id: str, line_nos: Collection[int], charged: int) -> None:
        settled = reservations.c.line_no == any_(literal(list(line_nos), ARRAY(Integer)))
        self._connection.execute(delete(reservations).where(reservations.c.batch_id == batch_id, settled))
        added = spending.c.charged + cast(charged, Numeric(38, 0))
        self._connection.execute(update(spending).where(spending.c.batch_id == batch_id).values(charged=added))

    def _lock(self, batch_id: str) -> tuple[int | None, int]:
        """(cap, charged so far), the row locked; a batch without a cap has no row."""
        cap = self._connection.execute(select(batches.c.max_cost).where(batches.c.id == batch_id)).one_or_none()
        if cap is None:
            raise NotFound(f"No batch with id {batch_id!r}.")
        if cap.max_cost is None:
            return None, 0
        self._connection.execute(upsert(spending).values(batch_id=batch_id).on_conflict_do_nothing())
        row: Any = self._connection.execute(select(spending.c.charged).where(spending.c.batch_id == batch_id).with_for_update()).one()
        return int(cap.max_cost), int(row.charged)

    def _release_stale(self, batch_id: str) -> None:
        """Reservations of leases that have ended: whoever claims the lines next reserves anew."""
        ended = or_(groups.c.token != reservations.c.token, groups.c.closed_at.is_not(None))
        self._connection.execute(
            delete(reservations).where(reservations.c.batch_id == batch_id, groups.c.id == reservations.c.group_id, ended)
        )
