"""Delivered lines: insert-only, so that whoever commits a line first has delivered it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, and_, any_, func, insert, literal, or_, select
from sqlalchemy.dialects.postgresql import ARRAY

from service.adapters.postgres import stream
from service.adapters.stores.bulk import insert_rows
from service.adapters.tables import line_results, lines, segments, token_ledger
from service.domain.line import LineOutcome, Outcome, Segment, StoredResult
from service.domain.usage import Work

_WORK = tuple(field.name for field in fields(Work))
_SAME_LINE = and_(line_results.c.batch_id == lines.c.batch_id, line_results.c.line_no == lines.c.line_no)
_STORED = (
    line_results.c.line_no,
    line_results.c.outcome,
    line_results.c.segment_key,
    line_results.c.byte_offset,
    line_results.c.byte_length,
    line_results.c.commit_no,
)


class Results:
    """ports.ResultStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, segment: Segment, outcomes: Sequence[tuple[LineOutcome, int, int]], commit_no: int) -> set[int]:
        self._connection.execute(insert(segments).values(**asdict(segment)))
        rows = [_row(segment, outcome, offset, length, commit_no) for outcome, offset, length in outcomes]
        if not rows:
            return set()
        statement = insert_rows(line_results, rows).on_conflict_do_nothing().returning(line_results.c.line_no)
        new = set(self._connection.execute(statement).scalars())
        works = [_work_row(outcome) for outcome, _, _ in outcomes if outcome.line_no in new]
        if works:
            self._connection.execute(insert_rows(token_ledger, works).on_conflict_do_nothing())
        return new

    def existing(self, batch_id: str, line_nos: Collection[int]) -> set[int]:
        wanted = line_results.c.line_no == any_(literal(list(line_nos), ARRAY(Integer)))
        query = select(line_results.c.line_no).where(line_results.c.batch_id == batch_id, wanted)
        return set(self._connection.execute(query).scalars())

    def after(self, batch_id: str, commit_no: int, limit: int) -> Sequence[StoredResult]:
        newer = (line_results.c.batch_id == batch_id, line_results.c.commit_no > commit_no)
        first = select(line_results.c.commit_no).where(*newer).order_by(line_results.c.commit_no).limit(limit).subquery()
        last = select(func.max(first.c.commit_no)).scalar_subquery()
        query = (
            select(lines.c.custom_id, *_STORED)
            .join(lines, _SAME_LINE)
            .where(*newer, line_results.c.commit_no <= last)
            .order_by(line_results.c.commit_no, line_results.c.line_no)
        )
        return [_stored(row) for row in self._connection.execute(query)]

    def in_order(self, batch_id: str) -> Iterator[tuple[int, str | None, StoredResult | None]]:
        query = (
            select(lines.c.line_no.label("input_line"), lines.c.custom_id, *_STORED)
            .outerjoin(line_results, _SAME_LINE)
            .where(lines.c.batch_id == batch_id)
            .order_by(lines.c.line_no)
        )
        for row in stream(self._connection, query):
            yield row.input_line, row.custom_id, _stored(row) if row.line_no is not None else None

    def segments(self, batch_id: str) -> Sequence[Segment]:
        query = select(segments).where(segments.c.batch_id == batch_id).order_by(segments.c.created_at, segments.c.key)
        return [Segment(row.key, row.batch_id, row.bytes, row.sha256, row.worker_id) for row in self._connection.execute(query)]

    def work(self, batch_id: str) -> Work:
        sums = [func.coalesce(func.sum(token_ledger.c[name]), 0) for name in _WORK]
        row = self._connection.execute(select(*sums).where(token_ledger.c.batch_id == batch_id)).one()
        return Work(*(int(value) for value in row))

    def unfinished(self, batch_id: str) -> Iterator[tuple[int, int, int]]:
        not_delivered: ColumnElement[bool] = or_(line_results.c.outcome.is_(None), line_results.c.outcome != Outcome.SUCCEEDED.value)
        query = (
            select(lines.c.line_no, lines.c.byte_offset, lines.c.byte_length)
            .outerjoin(line_results, _SAME_LINE)
            .where(lines.c.batch_id == batch_id, not_delivered)
            .order_by(lines.c.line_no)
        )
        for row in stream(self._connection, query):
            yield row.line_no, row.byte_offset, row.byte_length


def _work_row(outcome: LineOutcome) -> dict[str, Any]:
    work = {name: getattr(outcome.work, name) for name in _WORK}
    return {"batch_id": outcome.batch_id, "line_no": outcome.line_no, "drafter": outcome.drafter, **work}


def _row(segment: Segment, outcome: LineOutcome, offset: int, length: int, commit_no: int) -> dict[str, Any]:
    return {
        "batch_id": segment.batch_id,
        "line_no": outcome.line_no,
        "outcome": outcome.outcome.value,
        "status_code": outcome.status_code,
        "error_code": outcome.error_code,
        "segment_key": segment.key,
        "byte_offset": offset,
        "byte_length": length,
        "commit_no": commit_no,
        **asdict(outcome.usage),
    }


def _stored(row: Any) -> StoredResult:
    return StoredResult(
        line_no=row.line_no,
        custom_id=row.custom_id,
        outcome=Outcome(row.outcome),
        segment_key=row.segment_key,
        offset=row.byte_offset,
        length=row.byte_length,
        commit_no=row.commit_no,
    )
