"""Reads for reports and exports: the ledger by bucket and in detail, and the device time behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, and_, any_, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY

from service.adapters.postgres import stream
from service.adapters.stores.charges import charges, key_of, report_key
from service.adapters.tables import (
    batches,
    ledger_entries,
    ledger_transactions,
    line_results,
    lines,
    projects,
    segments,
    token_ledger,
    workers,
)
from service.domain.money import ChargeDetail, LedgerKind, LedgerTransaction, Leg, Meter
from service.domain.usage import Work
from service.ports import Bucket, ChargeFilter, WorkerRow, WorkRow

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_WORK = tuple(field.name for field in fields(Work))


class Costs:
    """ports.CostStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def buckets(self, which: ChargeFilter, *, width: timedelta, by: Sequence[str]) -> Sequence[Bucket]:
        start = func.date_bin(width, ledger_transactions.c.created_at, EPOCH)
        number = func.extract("epoch", start).cast(sa.BigInteger)
        rows = charges(self._connection, [number, *(report_key(name) for name in by)], _chosen(which))
        return [Bucket(datetime.fromtimestamp(int(row.key[0]), UTC), row.evolve(key=row.key[1:])) for row in rows]

    def details(self, which: ChargeFilter) -> Iterator[ChargeDetail]:
        charge = ledger_transactions.alias("charge")
        day = func.date_trunc("day", ledger_transactions.c.created_at).cast(sa.Date)
        charged_on = func.date_trunc("day", func.coalesce(charge.c.created_at, ledger_transactions.c.created_at)).cast(sa.Date)
        keys = (
            day.label("day"),
            batches.c.project_id,
            projects.c.name.label("project_name"),
            ledger_transactions.c.batch_id,
            ledger_transactions.c.model,
            ledger_transactions.c.price_version,
            ledger_transactions.c.kind,
            charged_on.label("charged_on"),
            ledger_entries.c.meter,
            ledger_entries.c.rate,
        )
        reversed_charge = and_(
            ledger_transactions.c.kind == LedgerKind.REVERSAL.value,
            charge.c.batch_id == ledger_transactions.c.batch_id,
            charge.c.line_no == ledger_transactions.c.line_no,
            charge.c.kind == LedgerKind.CHARGE.value,
        )
        query = (
            select(
                *keys,
                batches.c.metadata.label("tags"),
                func.sum(ledger_entries.c.quantity).label("quantity"),
                func.sum(ledger_entries.c.amount).label("amount"),
            )
            .select_from(
                ledger_transactions.join(ledger_entries, ledger_entries.c.transaction_id == ledger_transactions.c.id)
                .join(batches, batches.c.id == ledger_transactions.c.batch_id)
                .join(projects, projects.c.id == batches.c.project_id)
                .outerjoin(charge, reversed_charge)
            )
            .where(*_chosen(which), ledger_entries.c.meter.is_not(None))
            .group_by(*(key.element if isinstance(key, sa.Label) else key for key in keys), batches.c.metadata)
            .order_by(*(key.element if isinstance(key, sa.Label) else key for key in keys))
        )
        for row in stream(self._connection, query):
            values = dict(row._mapping)
            values["kind"], values["meter"] = LedgerKind(values["kind"]), Meter(values["meter"])
            values["quantity"], values["amount"] = int(values["quantity"]), int(values["amount"])
            yield ChargeDetail(**values)

    def work(self, which: ChargeFilter, *, by: Sequence[str]) -> Sequence[WorkRow]:
        at = line_results.c.created_at
        keys = [report_key(name, at=at, model=lines.c.model).label(f"key_{number}") for number, name in enumerate(by)]
        device, worker = func.coalesce(workers.c.device, ""), func.coalesce(segments.c.worker_id, "")
        sums = [func.coalesce(func.sum(token_ledger.c[name]), 0).label(name) for name in _WORK]
        same = (line_results.c.batch_id == token_ledger.c.batch_id, line_results.c.line_no == token_ledger.c.line_no)
        query = (
            select(*keys, worker.label("worker"), device.label("device"), func.count().label("lines"), *sums)
            .select_from(
                line_results.join(token_ledger, and_(*same))
                .join(lines, and_(lines.c.batch_id == line_results.c.batch_id, lines.c.line_no == line_results.c.line_no))
                .join(batches, batches.c.id == line_results.c.batch_id)
                .join(segments, segments.c.key == line_results.c.segment_key)
                .outerjoin(workers, workers.c.id == segments.c.worker_id)
            )
            .where(at >= which.start, at < which.end, *_of_batches(which, lines.c.model))
            .group_by(*keys, worker, device)
            .order_by(*keys, worker)
        )
        rows = self._connection.execute(query)
        return [
            WorkRow(key_of(row[: len(keys)]), row.worker, row.device, row.lines, Work(**{name: int(row._mapping[name]) for name in _WORK}))
            for row in rows
        ]

    def workers(self, start: datetime, end: datetime) -> Sequence[WorkerRow]:
        query = select(workers).where(workers.c.started_at < end, func.coalesce(workers.c.stopped_at, workers.c.seen_at) >= start)
        return [WorkerRow(**row._mapping) for row in self._connection.execute(query.order_by(workers.c.started_at, workers.c.id))]

    def charge_of(self, batch_id: str, line_no: int) -> LedgerTransaction | None:
        where = (ledger_transactions.c.batch_id == batch_id, ledger_transactions.c.line_no == line_no)
        head = self._connection.execute(
            select(ledger_transactions).where(*where, ledger_transactions.c.kind == LedgerKind.CHARGE.value)
        ).one_or_none()
        if head is None:
            return None
        legs = select(ledger_entries).where(ledger_entries.c.transaction_id == head.id).order_by(ledger_entries.c.leg)
        return LedgerTransaction(
            head.project_id,
            head.batch_id,
            head.line_no,
            LedgerKind.CHARGE,
            head.model,
            head.price_version,
            tuple(
                Leg(leg.account, int(leg.amount), Meter(leg.meter) if leg.meter else None, leg.quantity, leg.rate)
                for leg in self._connection.execute(legs)
            ),
        )


def _chosen(which: ChargeFilter) -> list[sa.ColumnElement[bool]]:
    at = ledger_transactions.c.created_at
    return [at >= which.start, at < which.end, *_of_batches(which, ledger_transactions.c.model)]


def _of_batches(which: ChargeFilter, model: sa.ColumnElement[Any]) -> list[sa.ColumnElement[bool]]:
    wanted = {
        batches.c.project_id: which.project_ids,
        batches.c.api_key_id: which.api_key_ids,
        batches.c.id: which.batch_ids,
        model: which.models,
    }
    return [column == any_(literal(list(values), ARRAY(sa.Text))) for column, values in wanted.items() if values is not None]
