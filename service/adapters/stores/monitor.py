"""How much there is to do, in one look: for metrics and alerts."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection, case, func, select

from service.adapters.stores.loads import refused_models
from service.adapters.tables import batches, groups, outbox, workers
from service.domain.job import BatchStatus
from service.ports import Backlog, OutboxKind, OutboxLag

TODAY = timedelta(days=1)

_ENDED = tuple(status.value for status in BatchStatus if status.terminal)


class Monitor:
    """ports.MonitorStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def backlog(self, live_within: timedelta) -> Backlog:
        live = select(func.count()).where(workers.c.stopped_at.is_(None), workers.c.seen_at > func.now() - live_within)
        return Backlog(
            groups=self._groups(),
            batches=self._batches(),
            outbox=self._outbox(),
            workers=int(self._connection.execute(live).scalar_one()),
            refused=sorted(refused_models(self._connection, TODAY)),
        )

    def _groups(self) -> dict[tuple[str, str], int]:
        state = case(
            (groups.c.lease_until.is_not(None), "leased"),
            (groups.c.not_before > func.now(), "waiting"),
            else_="due",
        )
        query = select(groups.c.model, state, func.count()).where(groups.c.closed_at.is_(None)).group_by(groups.c.model, state)
        return {(model, name): count for model, name, count in self._connection.execute(query)}

    def _batches(self) -> dict[str, int]:
        query = select(batches.c.status, func.count().label("open")).where(batches.c.status.not_in(_ENDED)).group_by(batches.c.status)
        return {row.status: row.open for row in self._connection.execute(query)}

    def _outbox(self) -> dict[OutboxKind, OutboxLag]:
        late = func.extract("epoch", func.now() - func.min(outbox.c.not_before))
        query = select(outbox.c.kind, func.count(), late).where(outbox.c.done_at.is_(None)).group_by(outbox.c.kind)
        return {OutboxKind(kind): OutboxLag(count, max(0.0, float(seconds))) for kind, count, seconds in self._connection.execute(query)}
