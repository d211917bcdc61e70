"""The periodic look at everything that a crash, a lost message or the clock may have left behind."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from service.ports import Database, OutboxKind
from service.usecases.cancel import expire_batch

TAKE_BACK = 1000
EXPIRE = 100
"""Rows a sweep handles at most; the next one follows soon."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found. `skipped`: another process was sweeping."""

    taken_back: int = 0
    expired: int = 0
    woken: int = 0
    skipped: bool = False


def sweep(database: Database) -> Swept:
    """Takes back leases that ran out, ends overdue batches, and promises a wake-up for every model with due groups.

    One sweep at a time (advisory lock). Suspect lines leave the groups that are taken back when these are claimed again.

    Raises:
        Unavailable: the database does not answer.
    """
    with database.begin() as uow:
        if not uow.try_lock("longdraft.sweep"):
            return Swept(skipped=True)
        taken_back = uow.watch.take_back_dead(TAKE_BACK)
        overdue = uow.batches.overdue(EXPIRE)
        due = uow.watch.due()
        for model in sorted(due):
            uow.outbox.add(OutboxKind.WAKE, payload={"model": model})
    if taken_back:
        log.warning("leases_ran_out", groups=len(taken_back))
    expired = sum(expire_batch(database, batch_id) for batch_id in overdue)
    return Swept(len(taken_back), expired, len(due))
