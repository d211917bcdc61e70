"""The cost of a batch, for its owner. Reads only: a report never writes money."""

from __future__ import annotations

from datetime import timedelta

from service.billing.reports import BatchCost, sum_up
from service.ports import ChargeFilter, Database
from service.usecases.submit import owned_batch

_MOMENT = timedelta(seconds=1)


def batch_cost(database: Database, project_id: str, batch_id: str) -> BatchCost:
    """What is charged so far; final once the batch has ended. Raises NotFound as `owned_batch` does."""
    with database.begin() as uow:
        batch = owned_batch(uow, project_id, batch_id)
        which = ChargeFilter(batch.created_at, uow.now + _MOMENT, batch_ids=[batch.id])
        lines = uow.ledger.batch_total(batch.id).lines
        return sum_up(batch, lines, uow.costs.details(which), uow.results.work(batch.id))
