"""The ledger and the price book. Rows are only ever inserted; the database refuses everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection, func, insert, select

from service.adapters.postgres import advisory_key
from service.adapters.stores.audit import violations
from service.adapters.stores.bulk import insert_rows
from service.adapters.stores.charges import charges, report_key
from service.adapters.tables import ledger_entries, ledger_transactions, price_books, prices
from service.domain.money import LedgerTransaction, PriceBook, Rates
from service.errors import Conflict, NotFound
from service.ports import ChargeRow

ANY_MODEL = "*"


class LedgerBook:
    """ports.Ledger on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def post(self, transactions: Sequence[LedgerTransaction]) -> None:
        if not transactions:
            return
        heads = [
            {"project_id": t.project_id, "batch_id": t.batch_id, "line_no": t.line_no, "kind": t.kind.value}
            | {"model": t.model, "price_version": t.price_version}
            for t in transactions
        ]
        columns = ledger_transactions.c
        statement = insert_rows(ledger_transactions, heads).returning(columns.id, columns.batch_id, columns.line_no, columns.kind)
        try:
            with self._connection.begin_nested():
                ids = {(row.batch_id, row.line_no, row.kind): row.id for row in self._connection.execute(statement)}
        except sa.exc.IntegrityError as error:
            raise Conflict(f"A line is already in the ledger: {str(error.orig).strip()}") from error
        # All legs in one statement: the database checks after it that they sum to zero.
        legs = [
            {"transaction_id": ids[t.batch_id, t.line_no, t.kind.value], "leg": number, "account": leg.account, "amount": leg.amount}
            | {"meter": leg.meter.value if leg.meter else None, "quantity": leg.quantity, "rate": leg.rate}
            for t in transactions
            for number, leg in enumerate(t.legs)
        ]
        self._connection.execute(insert_rows(ledger_entries, legs))

    # --- what was charged -------------------------------------------------------------------------------------------------------

    def batch_total(self, batch_id: str) -> ChargeRow:
        rows = charges(self._connection, [], [ledger_transactions.c.batch_id == batch_id])
        return rows[0] if rows else ChargeRow((), {}, {}, 0)

    def report(self, *, project_id: str | None, start: datetime, end: datetime, by: Sequence[str]) -> Sequence[ChargeRow]:
        which = [ledger_transactions.c.created_at >= start, ledger_transactions.c.created_at < end]
        if project_id is not None:
            which.append(ledger_transactions.c.project_id == project_id)
        return charges(self._connection, [report_key(name) for name in by], which)

    # --- prices -----------------------------------------------------------------------------------------------------------------

    def price_book(self, version: int | None = None) -> PriceBook:
        if version is None:
            version = self._connection.execute(select(func.max(price_books.c.version))).scalar_one()
        created_at = self._connection.execute(select(price_books.c.created_at).where(price_books.c.version == version)).scalar_one_or_none()
        if created_at is None:
            raise NotFound(f"There is no price book with version {version}.")
        rows = self._connection.execute(select(prices).where(prices.c.version == version))
        models = {row.model: Rates(row.input, row.cached_input, row.output) for row in rows}
        default = models.pop(ANY_MODEL, Rates(0, 0, 0))
        return PriceBook(int(version or 0), created_at, models, default)

    def price_history(self) -> Sequence[PriceBook]:
        versions = self._connection.execute(select(price_books.c.version).order_by(price_books.c.version)).scalars().all()
        return [self.price_book(version) for version in versions]

    def set_prices(self, models: Mapping[str, Rates], default: Rates | None = None) -> PriceBook:
        self._connection.execute(select(func.pg_advisory_xact_lock(advisory_key("longdraft.prices"))))
        newest = self.price_book()
        entries = {**newest.models, **models, ANY_MODEL: default or newest.default}
        version = newest.version + 1
        self._connection.execute(insert(price_books).values(version=version))
        self._connection.execute(
            insert(prices), [{"version": version, "model": model, **asdict(rates)} for model, rates in entries.items()]
        )
        return self.price_book(version)

    def violations(self, batch_id: str | None = None) -> Sequence[str]:
        return violations(self._connection, batch_id)
