"""Batches, and the memory of creates that makes them idempotent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from service.adapters.postgres import advisory_key
from service.adapters.tables import batches, idempotency_keys
from service.domain.job import Batch, BatchStatus, InputError, OnInvalidLine
from service.domain.usage import Usage
from service.errors import InvalidRequest, NotFound
from service.ports import Page

_USAGE = tuple(field.name for field in fields(Usage))
_COUNTERS = ("completed", "failed", "commit_no", *_USAGE)
_FIXED = ("id", "project_id", "created_at")
_RUNNING = (BatchStatus.VALIDATING.value, BatchStatus.IN_PROGRESS.value)


class Batches:
    """ports.BatchStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, batch: Batch) -> None:
        self._connection.execute(insert(batches).values(_values(batch)))

    def get(self, project_id: str, batch_id: str) -> Batch | None:
        query = select(batches).where(batches.c.id == batch_id, batches.c.project_id == project_id)
        row = self._connection.execute(query).one_or_none()
        return _batch(row) if row else None

    def load(self, batch_id: str, *, lock: bool = False) -> Batch:
        query = select(batches).where(batches.c.id == batch_id)
        row = self._connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFound(f"No batch with id {batch_id!r}.")
        return _batch(row)

    def page(self, project_id: str, *, after: str | None, limit: int) -> Page[Batch]:
        query = select(batches).where(batches.c.project_id == project_id)
        if after is not None:
            cursor = select(batches.c.seq).where(batches.c.id == after, batches.c.project_id == project_id)
            seq = self._connection.execute(cursor).scalar_one_or_none()
            if seq is None:
                raise InvalidRequest(f"No batch with id {after!r} to list after.", param="after")
            query = query.where(batches.c.seq < seq)
        rows = self._connection.execute(query.order_by(batches.c.seq.desc()).limit(limit + 1)).all()
        return Page([_batch(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def save(self, batch: Batch) -> None:
        changed = {name: value for name, value in _values(batch).items() if name not in _COUNTERS and name not in _FIXED}
        self._connection.execute(update(batches).where(batches.c.id == batch.id).values(changed))

    def count(self, batch_id: str, *, completed: int, failed: int, usage: Usage) -> int:
        added: Mapping[str, int] = {"completed": completed, "failed": failed, "commit_no": 1, **asdict(usage)}
        raised = {name: batches.c[name] + value for name, value in added.items()}
        statement = update(batches).where(batches.c.id == batch_id).values(raised).returning(batches.c.commit_no)
        commit_no = self._connection.execute(statement).scalar_one_or_none()
        if commit_no is None:
            raise NotFound(f"No batch with id {batch_id!r}.")
        return int(commit_no)

    def overdue(self, limit: int) -> Sequence[str]:
        late = select(batches.c.id).where(batches.c.status.in_(_RUNNING), batches.c.expires_at <= func.now())
        return list(self._connection.execute(late.order_by(batches.c.expires_at).limit(limit)).scalars())


class Requests:
    """ports.RequestMemory on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lock(self, project_id: str, digest: bytes) -> None:
        key = advisory_key(f"create:{project_id}:{digest.hex()}")
        self._connection.execute(select(func.pg_advisory_xact_lock(key)))

    def by_key(self, project_id: str, idempotency_key: str) -> tuple[bytes, str] | None:
        table = idempotency_keys
        query = select(table.c.request_digest, table.c.batch_id).where(table.c.project_id == project_id, table.c.key == idempotency_key)
        row = self._connection.execute(query).one_or_none()
        return (bytes(row.request_digest), row.batch_id) if row else None

    def remember(self, project_id: str, idempotency_key: str, digest: bytes, batch_id: str) -> None:
        values = {"project_id": project_id, "key": idempotency_key, "request_digest": digest, "batch_id": batch_id}
        self._connection.execute(upsert(idempotency_keys).values(values))

    def recent_twin(self, project_id: str, api_key_id: str | None, digest: bytes, within: timedelta) -> str | None:
        same = (
            batches.c.project_id == project_id,
            batches.c.request_digest == digest,
            batches.c.api_key_id.is_not_distinct_from(api_key_id),
            batches.c.created_at > func.now() - within,
        )
        query = select(batches.c.id).where(*same).order_by(batches.c.seq.desc()).limit(1)
        return self._connection.execute(query).scalar_one_or_none()

    def writer_of(self, output_uri: str) -> str | None:
        ended = [status.value for status in BatchStatus if status.terminal]
        query = select(batches.c.id).where(batches.c.output_uri == output_uri, batches.c.status.not_in(ended)).limit(1)
        return self._connection.execute(query).scalar_one_or_none()


def _values(batch: Batch) -> dict[str, Any]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    usage = values.pop("usage")
    return {
        **values,
        **{name: getattr(usage, name) for name in _USAGE},
        "status": batch.status.value,
        "outcome": batch.outcome.value if batch.outcome else None,
        "on_invalid_line": batch.on_invalid_line.value,
        "metadata": dict(batch.metadata),
        "errors": [asdict(error) for error in batch.errors],
    }


def _batch(row: Row[Any]) -> Batch:
    values = dict(row._mapping)
    del values["seq"]
    usage = Usage(**{name: values.pop(name) for name in _USAGE})
    return Batch(
        **{
            **values,
            "usage": usage,
            "status": BatchStatus(values["status"]),
            "outcome": BatchStatus(values["outcome"]) if values["outcome"] else None,
            "on_invalid_line": OnInvalidLine(values["on_invalid_line"]),
            "max_cost": int(values["max_cost"]) if values["max_cost"] is not None else None,
            "request_digest": bytes(values["request_digest"]) if values["request_digest"] is not None else None,
            "errors": tuple(InputError(**error) for error in values["errors"]),
        }
    )
