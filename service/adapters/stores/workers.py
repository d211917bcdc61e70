"""Worker processes: who is alive, and where their wall time went."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from service.adapters.tables import workers
from service.ports import WorkerRow

_METERS = ("model", "busy_ns", "idle_ns", "load_ns", "profile_ns", "tokens_per_second", "acceptance_length")


class Workers:
    """ports.WorkerStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def register(self, worker_id: str, *, host: str, pid: int, device: str) -> None:
        row = insert(workers).values(id=worker_id, host=host, pid=pid, device=device)
        again = row.on_conflict_do_update(index_elements=["id"], set_={"seen_at": func.now(), "stopped_at": None})
        self._connection.execute(again)

    def beat(self, worker: WorkerRow) -> None:
        meters = {name: getattr(worker, name) for name in _METERS}
        self._connection.execute(update(workers).where(workers.c.id == worker.id).values(seen_at=func.now(), **meters))

    def stop(self, worker_id: str) -> None:
        self._connection.execute(update(workers).where(workers.c.id == worker_id).values(stopped_at=func.now()))

    def get(self, worker_id: str) -> WorkerRow | None:
        row = self._connection.execute(select(workers).where(workers.c.id == worker_id)).one_or_none()
        return WorkerRow(**row._mapping) if row else None

    def live(self, within: timedelta) -> Sequence[WorkerRow]:
        query = select(workers).where(workers.c.stopped_at.is_(None), workers.c.seen_at > func.now() - within)
        return [WorkerRow(**row._mapping) for row in self._connection.execute(query.order_by(workers.c.started_at))]
