"""Sums over the ledger, grouped the way reports ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, func, select

from service.adapters.tables import batches, ledger_entries, ledger_transactions
from service.domain.money import LedgerKind
from service.errors import InvalidRequest
from service.ports import ChargeRow

REPORT_KEYS = ("day", "model", "project", "batch", "api_key")
TAG = "tag:"

Key = tuple[str, ...]


def charges(connection: Connection, keys: Sequence[sa.ColumnElement[Any]], which: Sequence[sa.ColumnElement[bool]]) -> list[ChargeRow]:
    """Metered legs of the chosen transactions, grouped by `keys`. A charge counts a line, a reversal takes it off again."""
    labelled = [key.label(f"key_{number}") for number, key in enumerate(keys)]
    joined = ledger_transactions.join(batches, batches.c.id == ledger_transactions.c.batch_id)
    counted = sa.case((ledger_transactions.c.kind == LedgerKind.CHARGE.value, 1), else_=-1)
    lines = select(*labelled, func.sum(counted).label("lines")).select_from(joined).where(*which).group_by(*labelled).order_by(*labelled)
    # The sum over nothing is NULL.
    per_key = {key_of(row[:-1]): int(row.lines or 0) for row in connection.execute(lines)}
    meters = (
        select(*labelled, ledger_entries.c.meter, func.sum(ledger_entries.c.amount), func.sum(ledger_entries.c.quantity))
        .select_from(joined.join(ledger_entries, ledger_entries.c.transaction_id == ledger_transactions.c.id))
        .where(*which, ledger_entries.c.meter.is_not(None))
        .group_by(*labelled, ledger_entries.c.meter)
    )
    amounts: dict[Key, dict[str, int]] = {}
    quantities: dict[Key, dict[str, int]] = {}
    for *values, meter, amount, quantity in connection.execute(meters):
        amounts.setdefault(key_of(values), {})[meter] = int(amount)
        quantities.setdefault(key_of(values), {})[meter] = int(quantity)
    return [ChargeRow(key, amounts.get(key, {}), quantities.get(key, {}), lines) for key, lines in per_key.items()]


def report_key(
    name: str, *, at: sa.ColumnElement[Any] = ledger_transactions.c.created_at, model: sa.ColumnElement[Any] = ledger_transactions.c.model
) -> sa.ColumnElement[Any]:
    """What a report is grouped by. `at` and `model`: the columns that say when, and which model, in the rows summed up.

    Raises InvalidRequest for a name that reports cannot be grouped by.
    """
    columns: Mapping[str, sa.ColumnElement[Any]] = {
        "day": func.to_char(at, "YYYY-MM-DD"),  # the session's time zone is UTC
        "model": model,
        "project": batches.c.project_id,
        "batch": batches.c.id,
        "api_key": batches.c.api_key_id,
    }
    if name in columns:
        return columns[name]
    if name.startswith(TAG):
        tag: sa.ColumnElement[Any] = batches.c.metadata[name.removeprefix(TAG)].astext
        return tag
    raise InvalidRequest(f"Costs can be grouped by {', '.join(REPORT_KEYS)} or {TAG}<metadata key>; got {name[:64]!r}.", param="group_by")


def key_of(values: Sequence[Any]) -> Key:
    """Group values as strings; what is not there (a tag that a batch lacks) is the empty one."""
    return tuple(str(value if value is not None else "") for value in values)
