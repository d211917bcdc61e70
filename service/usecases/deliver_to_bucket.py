"""Writes a finished batch into its owner's bucket: output.jsonl, errors.jsonl, cost.json, and manifest.json as the last of them.

The bytes of all four are settled when a batch enters its last phase, so whoever writes them again writes the same. The manifest is created,
never replaced: where it is ours, an earlier attempt got to the end; where it is another batch's, its results stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import orjson

from service.billing.cost_file import cost_file
from service.domain.job import Batch
from service.domain.object_uri import ObjectUri
from service.errors import BlobCorrupt
from service.ports import BlobInfo, BlobStore, ChargeFilter, Database, OutboxItem, UserBucket
from service.usecases.user_buckets import MANIFEST, READ_BYTES, explained, is_there, sha256_of, taken_folder

MAX_MANIFEST_BYTES = 1 << 20
_MOMENT = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch as it will end, and its files in our own store. `failed`: every line of the error file."""

    batch: Batch
    status: str
    output: BlobInfo | None
    errors: BlobInfo | None
    completed: int
    failed: int
    input_changed: bool | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt, for the holder of the finalize item. Every object is written only while the item is held."""

    item: OutboxItem
    database: Database
    blobs: BlobStore
    bucket: UserBucket
    folder: ObjectUri
    patient: bool

    def run(self, finished: Finished) -> None:
        """Writes whatever is not there yet.

        Raises:
            BucketProblem: the bucket refuses, or belongs to another batch's results.
            LeaseLost: someone else claimed the item.
            Unavailable, BlobNotFound, BlobCorrupt: to be tried again later.
        """
        if self._is_done(finished.batch):
            return
        objects = {
            "output": self._copied(finished.output, "output.jsonl", finished.completed),
            "errors": self._copied(finished.errors, "errors.jsonl", finished.failed),
            "cost": self._put("cost.json", self._cost(finished.batch)),
        }
        data = _json(manifest(finished, self.folder, objects))
        self._hold()
        with explained(self.folder, "output_uri", patient=self.patient):
            created = self.bucket.create(self.folder.child(MANIFEST).key, data)
        if not created:
            self._is_done(finished.batch)

    def _is_done(self, batch: Batch) -> bool:
        """Whether our manifest is there. Raises BucketProblem where it is another's."""
        key = self.folder.child(MANIFEST).key
        with explained(self.folder, "output_uri", patient=self.patient):
            if not is_there(self.bucket, key):
                return False
            with self.bucket.open(key) as stream:
                data = stream.read(MAX_MANIFEST_BYTES)
        try:
            ours = orjson.loads(data)["batch_id"] == batch.id
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise taken_folder(self.folder)
        return True

    def _copied(self, source: BlobInfo | None, name: str, lines: int) -> Mapping[str, Any] | None:
        if source is None:
            return None
        target = self.folder.child(name)
        self._hold()
        with self.blobs.open(source.key) as stream, ExitStack() as stack:
            with explained(target, "output_uri", patient=self.patient):
                writer = stack.enter_context(self.bucket.writer(target.key))
            while portion := stream.read(READ_BYTES):
                with explained(target, "output_uri", patient=self.patient):
                    writer.write(portion)
            with explained(target, "output_uri", patient=self.patient):
                written = writer.commit()
        if (written.bytes, written.sha256) != (source.bytes, source.sha256):
            raise BlobCorrupt(f"{source.key} has other bytes ({written.bytes}) than were written a moment ago ({source.bytes}).")
        return {"uri": str(target), "bytes": written.bytes, "sha256": written.sha256, "lines": lines}

    def _put(self, name: str, data: bytes) -> Mapping[str, Any]:
        target = self.folder.child(name)
        self._hold()
        with explained(target, "output_uri", patient=self.patient), self.bucket.writer(target.key) as writer:
            writer.write(data)
            writer.commit()
        return {"uri": str(target), "bytes": len(data), "sha256": sha256_of(data)}

    def _cost(self, batch: Batch) -> bytes:
        with self.database.begin() as uow:
            which = ChargeFilter(batch.created_at, uow.now + _MOMENT, batch_ids=[batch.id])
            book = uow.ledger.price_book(batch.price_version)
            lines = uow.ledger.batch_total(batch.id).lines
            return _json(cost_file(batch, book, uow.costs.details(which), lines, uow.results.work(batch.id)))

    def _hold(self) -> None:
        with self.database.begin() as uow:
            uow.outbox.hold(self.item)


def manifest(finished: Finished, folder: ObjectUri, objects: Mapping[str, Mapping[str, Any] | None]) -> Mapping[str, Any]:
    """What lies in the folder and where it came from. Times are whole Unix seconds; an object that would be empty is null."""
    batch = finished.batch
    return {
        "object": "batch.manifest",
        "version": 1,
        "batch_id": batch.id,
        "status": finished.status,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "metadata": dict(batch.metadata),
        "created_at": int(batch.created_at.timestamp()),
        "request_counts": {"total": batch.total, "completed": finished.completed, "failed": finished.failed},
        "input": {
            "uri": batch.input_uri,
            "file_id": batch.input_file_id,
            "etag": batch.input_etag,
            "changed_since": finished.input_changed,
        },
        "output_uri": str(folder),
        "objects": dict(objects),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
