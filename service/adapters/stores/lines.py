"""The lines of a batch: staged with COPY, read with server-side cursors, so memory is flat at a million of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import psycopg
from sqlalchemy import BigInteger, Connection, Integer, Text, and_, any_, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from service.adapters.postgres import stream
from service.adapters.tables import groups, line_results, lines, segments, token_ledger
from service.domain.line import PendingLine, StagedLine
from service.errors import Unavailable

_COPY = "COPY lines (batch_id, line_no, custom_id, byte_offset, byte_length, model, prefix_key, expected_tokens) FROM STDIN (FORMAT BINARY)"
_COPY_TYPES = ("text", "int4", "text", "int8", "int4", "text", "bytea", "int4")

_HAS_RESULT = and_(line_results.c.batch_id == lines.c.batch_id, line_results.c.line_no == lines.c.line_no)
_NO_RESULT = ~select(line_results.c.line_no).where(_HAS_RESULT).exists()

# (batch_id, line_no) pairs as two arrays: one statement and one plan for any number of them.
_KEYS = func.unnest(bindparam("batch_ids", type_=ARRAY(Text)), bindparam("line_nos", type_=ARRAY(Integer)))
_KEY_TABLE = _KEYS.table_valued("batch_id", "line_no", name="keys").render_derived()


class Lines:
    """ports.LineStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def stage(self, batch_id: str, lines: Sequence[StagedLine]) -> None:
        rows = (
            (batch_id, line.line_no, line.custom_id, line.offset, line.length, line.model, line.prefix_key, line.expected_tokens)
            for line in lines
        )
        driver = self._connection.connection.driver_connection
        assert driver is not None
        try:
            with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
                copy.set_types(_COPY_TYPES)
                for row in rows:
                    copy.write_row(row)
        except psycopg.OperationalError as error:
            # COPY goes past SQLAlchemy, so its pool has to be told that this connection is gone.
            self._connection.invalidate(error)
            raise Unavailable(f"The database does not answer: {str(error).strip()}") from error

    def clear(self, batch_id: str) -> None:
        # In the order of the foreign keys. The segments' objects stay behind without a row: the janitor's work.
        for table in (token_ledger, line_results, segments, lines, groups):
            self._connection.execute(delete(table).where(table.c.batch_id == batch_id))

    def duplicates(self, batch_id: str) -> Iterator[tuple[int, int, str]]:
        first = func.min(lines.c.line_no).over(partition_by=lines.c.custom_id.collate("C"))
        seen = (
            select(lines.c.line_no, first.label("first"), lines.c.custom_id)
            .where(lines.c.batch_id == batch_id, lines.c.custom_id.is_not(None))
            .subquery()
        )
        query = select(seen.c.line_no, seen.c.first, seen.c.custom_id).where(seen.c.line_no > seen.c.first).order_by(seen.c.line_no)
        for row in stream(self._connection, query):
            yield row.line_no, row.first, row.custom_id

    def for_grouping(self, batch_id: str) -> Iterator[StagedLine]:
        query = (
            select(lines)
            .where(lines.c.batch_id == batch_id, _NO_RESULT)
            .order_by(lines.c.model.collate("C"), lines.c.prefix_key, lines.c.expected_tokens.desc(), lines.c.line_no)
        )
        for row in stream(self._connection, query):
            yield StagedLine(
                line_no=row.line_no,
                offset=row.byte_offset,
                length=row.byte_length,
                custom_id=row.custom_id,
                model=row.model,
                prefix_key=bytes(row.prefix_key),
                expected_tokens=row.expected_tokens,
            )

    def pending(self, group_ids: Collection[int]) -> Sequence[PendingLine]:
        wanted = any_(bindparam("group_ids", type_=ARRAY(BigInteger)))
        query = select(lines).where(lines.c.group_id == wanted, _NO_RESULT).order_by(lines.c.group_id, lines.c.line_no)
        rows = self._connection.execute(query, {"group_ids": list(group_ids)})
        return [
            PendingLine(
                batch_id=row.batch_id,
                line_no=row.line_no,
                group_id=row.group_id,
                custom_id=row.custom_id,
                offset=row.byte_offset,
                length=row.byte_length,
                attempts=row.attempts,
            )
            for row in rows
        ]

    def admit(self, keys: Collection[tuple[str, int]]) -> None:
        self._add_attempts(keys, 1)

    def acquit(self, keys: Collection[tuple[str, int]]) -> None:
        self._add_attempts(keys, -1)

    def _add_attempts(self, keys: Collection[tuple[str, int]], change: int) -> None:
        if not keys:
            return
        mine = and_(lines.c.batch_id == _KEY_TABLE.c.batch_id, lines.c.line_no == _KEY_TABLE.c.line_no)
        attempts = func.greatest(lines.c.attempts + change, 0)
        values = {"batch_ids": [batch_id for batch_id, _ in keys], "line_nos": [line_no for _, line_no in keys]}
        self._connection.execute(update(lines).where(mine).values(attempts=attempts), values)
