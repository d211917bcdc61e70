"""Files by owner. Rows of deleted files stay, so that bills and batches keep their references; the janitor removes the objects."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from service.adapters.tables import batches, files, pending_uploads
from service.domain.account import File, FilePurpose
from service.domain.job import BatchStatus
from service.errors import InvalidRequest
from service.ports import Page

_OPEN = tuple(status.value for status in BatchStatus if not status.terminal)
_LIVE: ColumnElement[bool] = and_(files.c.deleted_at.is_(None), or_(files.c.expires_at.is_(None), files.c.expires_at > func.now()))
_READ_BY_OPEN_BATCH = select(batches.c.id).where(batches.c.input_file_id == files.c.id, batches.c.status.in_(_OPEN)).exists()


class Files:
    """ports.FileStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, file: File) -> None:
        self._connection.execute(
            insert(files).values(
                id=file.id,
                project_id=file.project_id,
                purpose=file.purpose.value,
                filename=file.filename,
                bytes=file.bytes,
                sha256=file.sha256,
                storage_key=file.storage_key,
                created_at=file.created_at,
                expires_at=file.expires_at,
            )
        )

    def get(self, project_id: str, file_id: str) -> File | None:
        query = select(files).where(files.c.id == file_id, files.c.project_id == project_id, _LIVE)
        row = self._connection.execute(query).one_or_none()
        return _file(row) if row else None

    def page(self, project_id: str, *, after: str | None, limit: int, ascending: bool, purpose: FilePurpose | None) -> Page[File]:
        query = select(files).where(files.c.project_id == project_id, _LIVE)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose.value)
        if after is not None:
            # A cursor may name a file that was deleted between two pages.
            cursor = select(files.c.seq).where(files.c.id == after, files.c.project_id == project_id)
            seq = self._connection.execute(cursor).scalar_one_or_none()
            if seq is None:
                raise InvalidRequest(f"No file with id {after!r} to list after.", param="after")
            query = query.where(files.c.seq > seq if ascending else files.c.seq < seq)
        order = files.c.seq.asc() if ascending else files.c.seq.desc()
        rows = self._connection.execute(query.order_by(order).limit(limit + 1)).all()
        return Page([_file(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def delete(self, project_id: str, file_id: str) -> bool:
        live = update(files).where(files.c.id == file_id, files.c.project_id == project_id, _LIVE)
        return self._connection.execute(live.values(deleted_at=func.now())).rowcount > 0

    def in_use(self, file_id: str) -> bool:
        query = select(files.c.id).where(files.c.id == file_id, _READ_BY_OPEN_BATCH)
        return self._connection.execute(query).one_or_none() is not None

    def set_expiry(self, file_id: str, at: datetime) -> None:
        self._connection.execute(update(files).where(files.c.id == file_id).values(expires_at=at))


class Garbage:
    """ports.FileGarbage on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def unreferenced_keys(self, limit: int) -> Sequence[str]:
        gone = and_(~_LIVE, ~files.c.object_removed, ~_READ_BY_OPEN_BATCH)
        return list(self._connection.execute(select(files.c.storage_key).where(gone).limit(limit)).scalars())

    def forget_keys(self, keys: Collection[str]) -> None:
        self._connection.execute(update(files).where(files.c.storage_key.in_(keys)).values(object_removed=True))

    def named(self, keys: Collection[str]) -> set[str]:
        found: set[str] = set()
        for table in (files, pending_uploads):
            found.update(self._connection.execute(select(table.c.storage_key).where(table.c.storage_key.in_(keys))).scalars())
        return found


def _file(row: object) -> File:
    values = dict(row._mapping)  # type: ignore[attr-defined]  # a SQLAlchemy Row
    for hidden in ("seq", "object_removed"):
        del values[hidden]
    return File(**{**values, "purpose": FilePurpose(values["purpose"])})
