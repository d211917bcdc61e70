"""Stores of money: the ledger with its price book, the caps on what a batch may cost, and what reports read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from service.domain.money import ChargeDetail, LedgerTransaction, PriceBook, Rates, Reservation, Reserved
from service.domain.usage import Work
from service.ports.workers import WorkerRow


@dataclass(frozen=True, slots=True)
class ChargeRow:
    """An aggregate of the ledger: amounts in femto-dollars."""

    key: tuple[str, ...]
    amounts: Mapping[str, int]
    quantities: Mapping[str, int]
    lines: int

    @property
    def total(self) -> int:
        return sum(self.amounts.values())

    def evolve(self, **changes: Any) -> ChargeRow:
        return replace(self, **changes)


class Ledger(Protocol):
    """Append-only double-entry ledger and the versioned price book."""

    def post(self, transactions: Sequence[LedgerTransaction]) -> None:
        """Inserts them; a second charge for a line raises Conflict and nothing is written."""
        ...

    def batch_total(self, batch_id: str) -> ChargeRow: ...
    def report(self, *, project_id: str | None, start: datetime, end: datetime, by: Sequence[str]) -> Sequence[ChargeRow]:
        """Charges net of reversals, grouped by any of day, model, project, batch, and `tag:<metadata key>`."""
        ...

    def price_book(self, version: int | None = None) -> PriceBook:
        """The newest, or a pinned version. Raises NotFound."""
        ...

    def price_history(self) -> Sequence[PriceBook]: ...
    def set_prices(self, models: Mapping[str, Rates], default: Rates | None = None) -> PriceBook:
        """A new version: the newest one with these entries replaced."""
        ...

    def violations(self, batch_id: str | None = None) -> Sequence[str]:
        """What breaks O1-O3 and O5 of the billing oracles, one sentence each; empty is good."""
        ...


class SpendingStore(Protocol):
    """Caps (`max_cost`) on what a batch may cost. Locked after groups and batches."""

    def reserve(self, batch_id: str, wanted: Sequence[Reservation]) -> Reserved:
        """Holds the worst cases that fit under the cap; all are granted where there is no cap."""
        ...

    def room(self, batch_id: str) -> int | None:
        """Femto-dollars that may still be charged, the row locked; None where there is no cap."""
        ...

    def settle(self, batch_id: str, line_nos: Collection[int], charged: int) -> None:
        """Ends the reservations of delivered lines and adds what they were charged."""
        ...


@dataclass(frozen=True, slots=True)
class ChargeFilter:
    """What a report looks at: from `start` up to, not including, `end`; None takes all."""

    start: datetime
    end: datetime
    project_ids: Collection[str] | None = None
    api_key_ids: Collection[str] | None = None
    batch_ids: Collection[str] | None = None
    models: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Charges of one time bucket that begins at `start`, for one group."""

    start: datetime
    charges: ChargeRow


@dataclass(frozen=True, slots=True)
class WorkRow:
    """What delivered lines made one worker do. `worker` and `device` are empty for lines that were settled without one."""

    key: tuple[str, ...]
    worker: str
    device: str
    lines: int
    work: Work


class CostStore(Protocol):
    """The ledger and the token ledger as reports and exports read them. Groups are named as in `Ledger.report`."""

    def buckets(self, which: ChargeFilter, *, width: timedelta, by: Sequence[str]) -> Sequence[Bucket]:
        """Charges net of reversals, by time (buckets aligned to the epoch, UTC) and group, in this order; empty buckets are left out."""
        ...

    def details(self, which: ChargeFilter) -> Iterator[ChargeDetail]:
        """The finest aggregate, oldest first; streamed."""
        ...

    def work(self, which: ChargeFilter, *, by: Sequence[str]) -> Sequence[WorkRow]:
        """Token ledgers of the lines delivered in the time chosen, by group and worker."""
        ...

    def workers(self, start: datetime, end: datetime) -> Sequence[WorkerRow]:
        """Those that lived at some time between; their meters are of their whole lives."""
        ...

    def charge_of(self, batch_id: str, line_no: int) -> LedgerTransaction | None: ...
