"""Users' buckets: how projects reach theirs, and files that are on their way into ours by a presigned URL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert

from service.adapters.tables import bucket_access, pending_uploads
from service.domain.account import BucketAccess, PendingUpload

_ACCESS = ("project_id", "access_key_id", "sealed_secret", "endpoint_url", "region", "path_style", "checksums")


class BucketAccesses:
    """ports.BucketAccessStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, project_id: str) -> BucketAccess | None:
        row = self._connection.execute(select(bucket_access).where(bucket_access.c.project_id == project_id)).one_or_none()
        return BucketAccess(**{**row._mapping, "sealed_secret": bytes(row.sealed_secret)}) if row else None

    def put(self, access: BucketAccess) -> None:
        values = {name: getattr(access, name) for name in _ACCESS}
        statement = upsert(bucket_access).values(values)
        self._connection.execute(statement.on_conflict_do_update(index_elements=["project_id"], set_={**values, "updated_at": func.now()}))

    def delete(self, project_id: str) -> bool:
        return self._connection.execute(delete(bucket_access).where(bucket_access.c.project_id == project_id)).rowcount > 0


class Uploads:
    """ports.UploadStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, upload: PendingUpload) -> None:
        self._connection.execute(insert(pending_uploads).values({name: getattr(upload, name) for name in PendingUpload.__slots__}))

    def get(self, project_id: str, upload_id: str) -> PendingUpload | None:
        query = select(pending_uploads).where(pending_uploads.c.id == upload_id, pending_uploads.c.project_id == project_id)
        row = self._connection.execute(query).one_or_none()
        return PendingUpload(**row._mapping) if row else None

    def remove(self, upload_id: str) -> None:
        self._connection.execute(delete(pending_uploads).where(pending_uploads.c.id == upload_id))

    def stale(self, older_than: timedelta, limit: int) -> Sequence[PendingUpload]:
        late = select(pending_uploads).where(pending_uploads.c.expires_at < func.now() - older_than)
        rows = self._connection.execute(late.order_by(pending_uploads.c.expires_at).limit(limit))
        return [PendingUpload(**row._mapping) for row in rows]
