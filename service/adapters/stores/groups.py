"""Groups of lines: leases with fencing tokens, judged by the database's clock alone.

Whoever writes to several groups locks them in id order; a claim never waits (SKIP LOCKED). A group is due when it is open, unleased, past
`not_before`, and its batch has time left. A lease that ran out is taken back by the sweeper before anyone can claim the group again, so
that lines which may have killed their worker are set apart first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Row,
    and_,
    any_,
    bindparam,
    cast,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from service.adapters.tables import batches, files, groups, line_results, lines
from service.domain.line import GroupLease, PlannedGroup

PLAN_GROUPS = 256
"""Groups created by one statement; about 16,000 lines are assigned by the next."""
CLAIM_GROUPS = 256
"""Groups one claim may take; it locks this many at most, for the moment the statement runs."""

_OPEN = groups.c.closed_at.is_(None)
_DUE = and_(_OPEN, groups.c.lease_until.is_(None), groups.c.not_before <= func.now(), groups.c.expires_at > func.now())
_RESULT_OF_LINE = and_(line_results.c.batch_id == lines.c.batch_id, line_results.c.line_no == lines.c.line_no)
_UNFINISHED = ~select(line_results.c.line_no).where(_RESULT_OF_LINE).exists()
_FREE: Mapping[str, Any] = {"token": groups.c.token + 1, "worker_id": None, "lease_until": None}
"""What giving a group back writes: whoever held it can write nothing more."""


class Groups:
    """ports.GroupStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def plan(self, batch_id: str, groups: Iterable[PlannedGroup]) -> int:
        batch = self._connection.execute(
            select(batches.c.endpoint, batches.c.priority, batches.c.expires_at).where(batches.c.id == batch_id)
        ).one()
        created = 0
        planned = iter(groups)
        while chunk := list(islice(planned, PLAN_GROUPS)):
            self._create(batch_id, batch, chunk)
            created += len(chunk)
        return created

    def _create(self, batch_id: str, batch: Any, planned: Sequence[PlannedGroup]) -> None:
        rows = [
            {"batch_id": batch_id, "model": group.model, "lines": len(group.line_nos), "expected_tokens": group.expected_tokens}
            | {"endpoint": batch.endpoint, "priority": batch.priority, "expires_at": batch.expires_at}
            for group in planned
        ]
        statement = insert(groups).returning(groups.c.id, sort_by_parameter_order=True)
        ids = self._connection.execute(statement, rows).scalars()
        pairs = [(line_no, group_id) for group, group_id in zip(planned, ids, strict=True) for line_no in group.line_nos]
        assign_lines(self._connection, batch_id, pairs)

    def claim(self, worker_id: str, *, model: str | None, lease: timedelta, max_lines: int) -> Sequence[GroupLease]:
        locked = (
            select(groups.c.id, groups.c.lines, groups.c.suspect, groups.c.priority, groups.c.expires_at)
            .where(_DUE, groups.c.model == (_busiest_model() if model is None else model))
            .order_by(groups.c.priority.desc(), groups.c.expires_at, groups.c.id)
            .limit(CLAIM_GROUPS)
            .with_for_update(skip_locked=True)
            .cte("locked")
            .prefix_with("MATERIALIZED", dialect="postgresql")
        )
        order = (locked.c.priority.desc(), locked.c.expires_at, locked.c.id)
        ranked = select(
            locked.c.id,
            func.row_number().over(order_by=order).label("place"),
            func.sum(locked.c.lines).over(order_by=order).label("lines_so_far"),
            func.sum(cast(locked.c.suspect, Integer)).over(order_by=order).label("suspects_so_far"),
        ).cte("ranked")
        # The first of them whatever it is; the next ones up to the size asked for, or to the first suspect.
        fits = or_(ranked.c.place == 1, and_(ranked.c.lines_so_far <= max_lines, ranked.c.suspects_so_far == 0))
        source = (
            select(batches, batches.c.metadata["task"].astext.label("task"), files.c.storage_key, files.c.sha256)
            .outerjoin(files, files.c.id == batches.c.input_file_id)
            .subquery("source")
        )
        statement = (
            update(groups)
            .where(groups.c.id.in_(select(ranked.c.id).where(fits)), source.c.id == groups.c.batch_id)
            .values(token=groups.c.token + 1, worker_id=worker_id, lease_until=func.now() + lease)
            .returning(
                groups,
                *(source.c[name] for name in ("project_id", "drafter", "task", "price_version", "max_cost", "storage_key", "sha256")),
            )
        )
        leases = [_lease(row) for row in self._connection.execute(statement)]
        return sorted(leases, key=lambda claimed: (-claimed.priority, claimed.expires_at, claimed.group_id))

    def renew(self, leases: Mapping[int, int], lease: timedelta) -> set[int]:
        held = self.lock_held(leases)
        self._connection.execute(update(groups).where(_among(held)).values(lease_until=func.now() + lease))
        return held

    def lock_held(self, leases: Mapping[int, int]) -> set[int]:
        query = select(groups.c.id, groups.c.token).where(_among(leases), _OPEN).order_by(groups.c.id).with_for_update()
        return {row.id for row in self._connection.execute(query) if row.token == leases[row.id]}

    def close_finished(self, group_ids: Collection[int]) -> set[int]:
        unfinished = select(lines.c.line_no).where(lines.c.group_id == groups.c.id, _UNFINISHED).exists()
        statement = update(groups).where(_among(group_ids), _OPEN, ~unfinished)
        closed = self._connection.execute(statement.values(closed_at=func.now(), **_FREE).returning(groups.c.id))
        return set(closed.scalars())

    def release(self, leases: Mapping[int, int], *, delay: timedelta = timedelta(0)) -> None:
        held = self.lock_held(leases)
        self._connection.execute(update(groups).where(_among(held)).values(not_before=func.now() + delay, **_FREE))

    def close_batch(self, batch_id: str) -> int:
        query = select(groups.c.id).where(groups.c.batch_id == batch_id, _OPEN).order_by(groups.c.id).with_for_update()
        open_ids = self._connection.execute(query).scalars().all()
        self._connection.execute(update(groups).where(_among(open_ids)).values(closed_at=func.now(), **_FREE))
        return len(open_ids)


class Watch:
    """ports.GroupWatch on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def due(self) -> Mapping[str, int]:
        return self._count_by_model(_DUE)

    def due_or_leased(self) -> Mapping[str, int]:
        return self._count_by_model(and_(_OPEN, groups.c.expires_at > func.now()))

    def _count_by_model(self, which: ColumnElement[bool]) -> Mapping[str, int]:
        rows = self._connection.execute(select(groups.c.model, func.count().label("groups")).where(which).group_by(groups.c.model))
        return {row.model: row.groups for row in rows}

    def open_in(self, batch_id: str) -> int:
        query = select(func.count()).select_from(groups).where(groups.c.batch_id == batch_id, _OPEN)
        return int(self._connection.execute(query).scalar_one())

    def take_back_dead(self, limit: int) -> Sequence[int]:
        return self._take_back(groups.c.lease_until < func.now(), limit)

    def take_back_worker(self, worker_id: str) -> Sequence[int]:
        return self._take_back(groups.c.worker_id == worker_id, None)

    def _take_back(self, which: ColumnElement[bool], limit: int | None) -> Sequence[int]:
        query = select(groups.c.id).where(_OPEN, which).order_by(groups.c.id).limit(limit).with_for_update(skip_locked=limit is not None)
        taken = self._connection.execute(query).scalars().all()
        self._connection.execute(update(groups).where(_among(taken)).values(not_before=func.now(), **_FREE))
        return taken

    def isolate(self, group_ids: Collection[int], *, attempts: int) -> int:
        accused = and_(lines.c.attempts >= attempts, _UNFINISHED)
        query = (
            select(lines.c.batch_id, lines.c.line_no, lines.c.group_id, lines.c.expected_tokens)
            .add_columns(groups.c.model, groups.c.endpoint, groups.c.priority, groups.c.expires_at)
            .join(groups, groups.c.id == lines.c.group_id)
            .where(_among(group_ids), _OPEN, ~groups.c.suspect, accused)
            .order_by(lines.c.batch_id, lines.c.line_no)
        )
        suspects = [dict(row._mapping) for row in self._connection.execute(query)]
        if not suspects:
            return 0
        self._set_apart(suspects)
        self._shrink({suspect["group_id"] for suspect in suspects})
        return len(suspects)

    def _set_apart(self, suspects: Sequence[Mapping[str, Any]]) -> None:
        shared = ("batch_id", "model", "endpoint", "priority", "expires_at", "expected_tokens")
        rows = [{name: suspect[name] for name in shared} | {"lines": 1, "suspect": True} for suspect in suspects]
        ids = self._connection.execute(insert(groups).returning(groups.c.id, sort_by_parameter_order=True), rows).scalars().all()
        moved: dict[str, list[tuple[int, int]]] = {}
        for suspect, group_id in zip(suspects, ids, strict=True):
            moved.setdefault(suspect["batch_id"], []).append((suspect["line_no"], group_id))
        for batch_id, pairs in moved.items():
            assign_lines(self._connection, batch_id, pairs)

    def _shrink(self, group_ids: Collection[int]) -> None:
        """The groups that suspects came from: smaller now, and closed where nothing is left to run."""
        left = select(func.count()).where(lines.c.group_id == groups.c.id).scalar_subquery()
        self._connection.execute(update(groups).where(_among(group_ids)).values(lines=left))
        Groups(self._connection).close_finished(group_ids)


def assign_lines(connection: Connection, batch_id: str, pairs: Iterable[tuple[int, int]]) -> None:
    """Puts lines into groups: (line number, group id)."""
    line_nos, group_ids = zip(*pairs, strict=True)
    table = _pairs_table()
    moved = update(lines).where(lines.c.batch_id == batch_id, lines.c.line_no == table.c.line_no).values(group_id=table.c.group_id)
    connection.execute(moved, {"line_nos": list(line_nos), "group_ids": list(group_ids)})


def _pairs_table() -> Any:
    arrays = bindparam("line_nos", type_=ARRAY(Integer)), bindparam("group_ids", type_=ARRAY(BigInteger))
    return func.unnest(*arrays).table_valued("line_no", "group_id", name="pairs").render_derived()


def _busiest_model() -> Any:
    most = func.sum(groups.c.expected_tokens).desc()
    return select(groups.c.model).where(_DUE).group_by(groups.c.model).order_by(most).limit(1).scalar_subquery()


def _among(ids: Iterable[int]) -> ColumnElement[bool]:
    """One array parameter: one plan for any number of groups."""
    return groups.c.id == any_(literal(sorted(ids), ARRAY(BigInteger)))


def _lease(row: Row[Any]) -> GroupLease:
    return GroupLease(
        group_id=row.id,
        token=row.token,
        batch_id=row.batch_id,
        project_id=row.project_id,
        model=row.model,
        endpoint=row.endpoint,
        priority=row.priority,
        expires_at=row.expires_at,
        drafter=row.drafter,
        price_version=row.price_version,
        suspect=row.suspect,
        input_key=row.storage_key,
        input_sha256=row.sha256,
        task=row.task,
        capped=row.max_cost is not None,
    )
