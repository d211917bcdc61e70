"""Ending a batch early: by its owner (cancel) or by the clock (expiry). What is delivered stays delivered, and billed."""

from __future__ import annotations

import structlog

from service.domain.job import Batch, BatchStatus
from service.errors import Conflict
from service.ports import Database, OutboxKind, UnitOfWork
from service.usecases.submit import owned_batch

log = structlog.get_logger(__name__)


def cancel_batch(database: Database, project_id: str, batch_id: str) -> Batch:
    """Stops a batch; the finaliser then writes its files and makes it cancelled. Cancelling twice changes nothing.

    Raises:
        NotFound: no such batch in this project.
        Conflict: it has ended, or its files are being written.
    """
    while True:
        try:
            with database.begin() as uow:
                before = owned_batch(uow, project_id, batch_id)
                if before.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                    return before
                batch = _close(uow, batch_id)
                if batch.status is BatchStatus.CANCELLING:
                    return batch
                if batch.status not in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
                    raise Conflict(f"Batch {batch_id} is {batch.status.value} and can no longer be cancelled.", param="batch_id")
                batch = batch.to(BatchStatus.CANCELLING, uow.now)
                uow.batches.save(batch)
                uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch_id)
                log.info("batch_cancelling", batch_id=batch_id, done=batch.completed + batch.failed, total=batch.total)
                return batch
        except _GroupsAppeared:
            continue


def expire_batch(database: Database, batch_id: str) -> bool:
    """Ends a batch whose window is over; the finaliser then writes what there is. False where it is not overdue (any more)."""
    while True:
        try:
            with database.begin() as uow:
                _expire(uow, batch_id)
        except _GroupsAppeared:
            continue
        except _NotOverdue:
            return False
        return True


def _expire(uow: UnitOfWork, batch_id: str) -> None:
    batch = _close(uow, batch_id)
    if batch.status not in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS) or batch.expires_at > uow.now:
        raise _NotOverdue
    uow.batches.save(batch.to(BatchStatus.FINALIZING, uow.now, outcome=BatchStatus.EXPIRED))
    uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch_id)
    log.info("batch_expired", batch_id=batch_id, done=batch.completed + batch.failed, total=batch.total)


class _GroupsAppeared(Exception):
    """Validation ended between the two locks: the groups it made have to be closed as well, in a new transaction."""


class _NotOverdue(Exception):
    """Rolls the closing of the groups back."""


def _close(uow: UnitOfWork, batch_id: str) -> Batch:
    """Closes the groups, so that no worker can commit to them, and locks the batch; in this order, like every commit does."""
    uow.groups.close_batch(batch_id)
    batch = uow.batches.load(batch_id, lock=True)
    if uow.watch.open_in(batch_id):
        raise _GroupsAppeared
    return batch
