"""Many rows in one statement: each column travels as one array, so the text, and with it the plan, is the same for any number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Table, func, select
from sqlalchemy.dialects.postgresql import ARRAY, Insert, insert


def insert_rows(table: Table, rows: Sequence[Mapping[str, Any]]) -> Insert:
    """`INSERT INTO table (...) SELECT ... FROM unnest(...)` of at least one row; all rows name the same columns."""
    names = list(rows[0])
    arrays = [_array(table.c[name].type, [row[name] for row in rows]) for name in names]
    source = func.unnest(*arrays).table_valued(*names, name="new").render_derived()
    return insert(table).from_select(names, select(*(source.c[name] for name in names)))


def _array(kind: sa.types.TypeEngine[Any], values: Sequence[Any]) -> sa.Cast[Any]:
    return sa.cast(sa.literal(list(values), ARRAY(kind)), ARRAY(kind))
