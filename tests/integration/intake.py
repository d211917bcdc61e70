"""Helpers of the intake tests: a batch from bytes, its validation, and what is known of it afterwards."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from service.adapters.memory import MemoryBuckets
from service.config import Limits
from service.domain.account import File, FilePurpose, Project
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch, OnInvalidLine
from service.domain.result_lines import ResultLine, decode_result
from service.ports import BlobStore, Database, OutboxItem, OutboxKind, UserBuckets
from service.usecases.validate import validate_batch
from tests.bad_input import ENDPOINT, MODEL

LEASE = timedelta(seconds=60)


@dataclass
class Intake:
    """The front half of the service on a real database: submit, validate, look."""

    database: Database
    blobs: BlobStore
    limits: Limits = field(default_factory=Limits)
    group_lines: int = 64
    lease: timedelta = LEASE
    buckets: UserBuckets = field(default_factory=MemoryBuckets)

    def __post_init__(self) -> None:
        with self.database.begin() as uow:
            self.project: Project = uow.accounts.add_project(f"intake-{uuid.uuid4().hex}")

    def submit(self, data: bytes, on_invalid_line: OnInvalidLine = OnInvalidLine.FAIL, **changes: Any) -> Batch:
        """Stores the input and creates the batch with its promise to be validated."""
        file_id = new_file_id()
        key = f"files/{file_id}/input.jsonl"
        self.blobs.put(key, data)
        with self.database.begin() as uow:
            digest = hashlib.sha256(data).hexdigest()
            uow.files.add(File(file_id, self.project.id, FilePurpose.BATCH, "input.jsonl", len(data), digest, key, uow.now))
            batch = Batch(
                id=new_batch_id(),
                project_id=self.project.id,
                endpoint=ENDPOINT,
                completion_window="24h",
                created_at=uow.now,
                expires_at=uow.now + timedelta(hours=24),
                price_version=uow.ledger.price_book().version,
                input_file_id=file_id,
                on_invalid_line=on_invalid_line,
                **changes,
            )
            uow.batches.add(batch)
            uow.outbox.add(OutboxKind.VALIDATE, batch_id=batch.id)
        return batch

    def claim(self, batch: Batch) -> OutboxItem:
        """Takes the batch's validate item, as the control process does."""
        with self.database.begin() as uow:
            items = uow.outbox.claim("test", kinds=[OutboxKind.VALIDATE], lease=LEASE, limit=1000)
        return next(item for item in items if item.batch_id == batch.id)

    def validate(self, item: OutboxItem, blobs: BlobStore | None = None) -> None:
        validate_batch(
            item,
            database=self.database,
            blobs=blobs or self.blobs,
            buckets=self.buckets,
            limits=self.limits,
            resolve_model={MODEL: MODEL, "gpt-4o-mini": MODEL, "other": "other"}.get,
            lease=self.lease,
            group_lines=self.group_lines,
        )

    def run(self, data: bytes, on_invalid_line: OnInvalidLine = OnInvalidLine.FAIL) -> Batch:
        """Submits, validates, and returns the batch as it then is."""
        batch = self.submit(data, on_invalid_line)
        self.validate(self.claim(batch))
        return self.load(batch)

    def load(self, batch: Batch) -> Batch:
        with self.database.begin() as uow:
            return uow.batches.load(batch.id)

    def lines_to_run(self, batch: Batch) -> list[int]:
        """Line numbers a worker would be given, group by group."""
        with self.database.begin() as uow:
            return [line.line_no for line in uow.lines.for_grouping(batch.id)]

    def results(self, batch: Batch) -> dict[int, ResultLine]:
        """Delivered lines, read back from their segments."""
        found = {}
        with self.database.begin() as uow:
            rows = [(line_no, stored) for line_no, _, stored in uow.results.in_order(batch.id) if stored is not None]
        for line_no, stored in rows:
            with self.blobs.open(stored.segment_key, start=stored.offset, length=stored.length) as stream:
                found[line_no] = decode_result(stream.read())
        return found

    def promised(self, batch: Batch) -> set[OutboxKind]:
        """Open outbox items of the batch (claims everything that is due)."""
        with self.database.begin() as uow:
            items = uow.outbox.claim("look", kinds=list(OutboxKind), lease=timedelta(seconds=1), limit=1000)
        return {item.kind for item in items if item.batch_id == batch.id}
