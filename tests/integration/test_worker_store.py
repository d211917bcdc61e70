"""Workers on PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

from service.ports import Database, WorkerRow


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
