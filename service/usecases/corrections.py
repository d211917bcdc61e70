"""Taking charges back. The ledger keeps the charge and gains its opposite; the bill shows the difference."""

from __future__ import annotations

import structlog

from service.billing.ledger import reversal
from service.domain.money import LedgerTransaction
from service.errors import Conflict, NotFound
from service.ports import Database

log = structlog.get_logger(__name__)


def reverse_charge(database: Database, batch_id: str, line_no: int) -> LedgerTransaction:
    """Posts the reversal of a line's charge, at the price it was charged at.

    Raises:
        NotFound: the line was never charged.
        Conflict: it was reversed before.
    """
    with database.begin() as uow:
        charge = uow.costs.charge_of(batch_id, line_no)
        if charge is None:
            raise NotFound(f"Line {line_no} of {batch_id} has no charge to reverse.")
        reversed_charge = reversal(charge)
        try:
            uow.ledger.post([reversed_charge])
        except Conflict as error:
            raise Conflict(f"The charge of line {line_no} of {batch_id} was taken back before.") from error
    log.info("charge_reversed", batch_id=batch_id, line_no=line_no)
    return reversed_charge
