"""Removes objects that nothing names: of deleted files, of puts that never ended, and what crashes left behind of batches that ended."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import groupby, islice

import structlog

from service.domain.job import Batch
from service.errors import NotFound
from service.ports import BlobStore, Database

ORPHANS_AFTER = timedelta(hours=1)
"""How long a batch must have ended before its unnamed objects go: by then no worker or finaliser of it is left."""
ABANDONED_AFTER = timedelta(days=1)
"""How long a put may take at most before it counts as left behind by a crash."""
FILES = 500

log = structlog.get_logger(__name__)


def clean(database: Database, blobs: BlobStore, *, orphans_after: timedelta = ORPHANS_AFTER) -> int:
    """One pass over deleted files and over all segments and outputs; returns how many objects were removed. Raises Unavailable."""
    removed = remove_deleted_files(database, blobs) + blobs.discard_abandoned(ABANDONED_AFTER)
    removed += remove_stale_uploads(database, blobs)
    for prefix in ("segments/", "outputs/", "inputs/"):
        for batch_id, keys in _by_batch(blobs, prefix):
            for key in _unnamed(database, batch_id, keys, orphans_after):
                blobs.delete(key)
                removed += 1
    if removed:
        log.info("objects_removed", objects=removed)
    return removed


def remove_deleted_files(database: Database, blobs: BlobStore) -> int:
    """The objects of files that were deleted or expired, once no open batch reads them."""
    removed = 0
    while True:
        with database.begin() as uow:
            keys = uow.garbage.unreferenced_keys(FILES)
        for key in keys:
            blobs.delete(key)
        if keys:
            with database.begin() as uow:
                uow.garbage.forget_keys(keys)
        removed += len(keys)
        if len(keys) < FILES:
            return removed


def remove_stale_uploads(database: Database, blobs: BlobStore) -> int:
    """What was put by a presigned URL that ran out a day ago, and never registered."""
    with database.begin() as uow:
        stale = uow.uploads.stale(ABANDONED_AFTER, FILES)
    for upload in stale:
        blobs.delete(upload.storage_key)
        with database.begin() as uow:
            uow.uploads.remove(upload.id)
    return len(stale)


class UploadOrphans:
    """Objects of uploads whose process died before the row that names them was written.

    An object that is on its way to its row looks the same, and stores do not tell ages: a key goes when it was found unnamed twice, with
    `orphans_after` between. A process that restarts in between only begins anew.
    """

    def __init__(self, *, orphans_after: timedelta = ORPHANS_AFTER) -> None:
        self._after = orphans_after
        self._first_seen: dict[str, datetime] = {}

    def remove(self, database: Database, blobs: BlobStore) -> int:
        """One pass over all input files; returns how many objects were removed. Raises Unavailable."""
        unnamed: dict[str, datetime] = {}
        removed = 0
        keys = (info.key for info in blobs.list("files/"))
        while portion := list(islice(keys, FILES)):
            with database.begin() as uow:
                named, now = uow.garbage.named(portion), uow.now
            for key in portion:
                if key in named:
                    continue
                seen = self._first_seen.get(key, now)
                if key in self._first_seen and now - seen >= self._after:
                    blobs.delete(key)
                    removed += 1
                else:
                    unnamed[key] = seen
        self._first_seen = unnamed
        if removed:
            log.info("orphaned_uploads_removed", objects=removed)
        return removed


def _by_batch(blobs: BlobStore, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Keys under `<prefix><batch id>/`, a batch at a time; stores list in key order."""
    keys = (info.key for info in blobs.list(prefix))
    for batch_id, group in groupby(keys, key=lambda key: key.split("/")[1]):
        yield batch_id, list(group)


def _unnamed(database: Database, batch_id: str, keys: list[str], orphans_after: timedelta) -> list[str]:
    """Those that no row names, if the batch ended long enough ago."""
    with database.begin() as uow:
        try:
            batch = uow.batches.load(batch_id)
        except NotFound:
            return []  # not one of this database's: leave it alone
        if not batch.status.terminal or uow.now - _ended_at(batch) < orphans_after:
            return []
        named = {segment.key for segment in uow.results.segments(batch_id)}
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None and (file := uow.files.get(batch.project_id, file_id)) is not None:
                named.add(file.storage_key)
        return [key for key in keys if key not in named]


def _ended_at(batch: Batch) -> datetime:
    ended = batch.completed_at or batch.expired_at or batch.cancelled_at or batch.failed_at
    assert ended is not None
    return ended
