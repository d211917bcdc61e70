"""Writes a batch's output and error files in input order, and exposes them.

Several finalisers may work on the same batch (a lease ran out, a process was killed): each writes under keys that carry its own fencing
token, and only the one whose token is the newest in the last transaction exposes its files. Until then nothing of it can be seen.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import BinaryIO

import structlog

from service.domain.account import File, FilePurpose
from service.domain.ids import new_file_id
from service.domain.job import Batch, BatchStatus, InputError
from service.domain.line import LineOutcome, Outcome, Segment, StoredResult
from service.domain.object_uri import ObjectUri
from service.domain.result_lines import encode_result
from service.domain.usage import Usage
from service.errors import BlobCorrupt, LeaseLost, LongdraftError, Unavailable
from service.ports import BlobInfo, BlobStore, BlobWriter, Database, OutboxItem, UnitOfWork, UserBuckets
from service.usecases.deliver_to_bucket import Delivery, Finished
from service.usecases.user_buckets import BucketProblem, explained, has_changed, open_bucket

READ_BYTES = 1 << 20
UNREACHABLE_ATTEMPTS = 30
"""A user's store that does not answer is waited for (some 25 minutes); then the batch fails, with its results among our files."""

log = structlog.get_logger(__name__)


def finalize_batch(item: OutboxItem, *, database: Database, blobs: BlobStore, buckets: UserBuckets) -> None:
    """Carries out a `finalize` item and marks it done. Safe to repeat from the start at any point; the caller renews the item's lease.

    Raises:
        LeaseLost: someone else claimed the item; what this call wrote is removed again.
        Unavailable, BlobNotFound, BlobCorrupt: to be tried again later.
    """
    if item.batch_id is None:
        raise ValueError(f"outbox item {item.id} names no batch")
    with database.begin() as uow:
        uow.outbox.hold(item)
        batch = uow.batches.load(item.batch_id)
        if batch.status not in (BatchStatus.FINALIZING, BatchStatus.CANCELLING):
            uow.outbox.done(item)
            return
        if batch.total == 0:  # it ended while it was validated: no line was ever accepted
            uow.lines.clear(batch.id)
        segments = uow.results.segments(batch.id)
    files = _Files(blobs, f"outputs/{batch.id}/{item.token}")
    with ExitStack() as stack:
        stack.enter_context(files)
        spool = stack.enter_context(_spooled(blobs, segments))
        with database.begin() as reading:
            _write_lines(batch, reading.results.in_order(batch.id), spool, files)
        files.commit()
    problem, changed = None, has_changed(database, buckets, batch)
    try:
        problem = _deliver(item, batch, files, changed, database, blobs, buckets)
    except LongdraftError:
        files.discard()  # the next attempt writes its own
        raise
    try:
        with database.begin() as uow:
            uow.outbox.hold(item)
            _expose(uow, item, files, problem, changed)
    except LeaseLost:
        files.discard()
        raise
    log.info("batch_finalized", batch_id=batch.id, completed=files.completed, failed=files.failed, never_run=files.missing)


# --- the files ------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Output:
    """One of the two files, created with its first line."""

    key: str
    writer: BlobWriter | None = None
    info: BlobInfo | None = None


@dataclass(slots=True)
class _Files:
    """Output and error file of one attempt, and what went into them."""

    blobs: BlobStore
    prefix: str
    completed: int = 0
    failed: int = 0
    missing: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)
    output: _Output = field(init=False)
    errors: _Output = field(init=False)

    def __post_init__(self) -> None:
        self.output, self.errors = _Output(f"{self.prefix}/output.jsonl"), _Output(f"{self.prefix}/errors.jsonl")

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def add(self, outcome: Outcome, line: bytes) -> None:
        succeeded = outcome is Outcome.SUCCEEDED
        self.completed += succeeded
        self.failed += not succeeded
        self._write(self.output if succeeded else self.errors, line)

    def add_missing(self, line: bytes) -> None:
        self.missing += 1
        self._write(self.errors, line)

    def commit(self) -> None:
        """Makes the objects visible in the store (no batch names them yet)."""
        for file in (self.output, self.errors):
            file.info = file.writer.commit() if file.writer else None

    def discard(self) -> None:
        """Removes what `commit` made visible. Only for keys that no one will name: our token is out of date."""
        for file in (self.output, self.errors):
            if file.info is not None:
                self.blobs.delete(file.key)

    def _write(self, file: _Output, line: bytes) -> None:
        if file.writer is None:
            file.writer = self._stack.enter_context(self.blobs.writer(file.key))
        file.writer.write(line)


def _write_lines(batch: Batch, lines: Iterator[tuple[int, str | None, StoredResult | None]], spool: _Spool, files: _Files) -> None:
    """Every line of the input, in its order: the committed bytes, or why it was never run."""
    code, message = _never_run(batch)
    for line_no, custom_id, stored in lines:
        if stored is not None:
            files.add(stored.outcome, spool.line(stored))
            continue
        if code is None:
            raise BlobCorrupt(f"Batch {batch.id} is finalizing, but line {line_no} has no result.")
        outcome = LineOutcome(batch.id, line_no, None, custom_id, Outcome.FAILED, error_code=code, error_message=message)
        files.add_missing(encode_result(outcome))


def _never_run(batch: Batch) -> tuple[str | None, str]:
    """Error code and message of lines without a result; no code where there must be none."""
    if batch.status is BatchStatus.CANCELLING:
        return "batch_cancelled", "The batch was cancelled before this line was run."
    if batch.outcome is BatchStatus.EXPIRED:
        return "batch_expired", "The batch's completion window ended before this line was run."
    return None, ""


# --- the user's bucket ----------------------------------------------------------------------------------------------------------


def _deliver(
    item: OutboxItem, batch: Batch, files: _Files, changed: bool | None, database: Database, blobs: BlobStore, buckets: UserBuckets
) -> InputError | None:
    """Writes the batch to its `output_uri`, if it has one; what the bucket had against it."""
    if batch.output_uri is None:
        return None
    folder = ObjectUri.of_folder(batch.output_uri, param="output_uri")
    patient = item.attempts < UNREACHABLE_ATTEMPTS
    finished = Finished(
        batch, _end(batch).value, files.output.info, files.errors.info, files.completed, files.failed + files.missing, changed
    )
    try:
        with explained(folder, "output_uri", patient=patient):
            bucket = open_bucket(database, buckets, batch.project_id, folder)
        Delivery(item, database, blobs, bucket, folder, patient).run(finished)
    except BucketProblem as problem:
        log.warning("output_not_delivered", batch_id=batch.id, code=problem.error.code)
        return problem.error
    return None


# --- exposure -------------------------------------------------------------------------------------------------------------------


def _end(batch: Batch) -> BatchStatus:
    """What the batch will become."""
    return BatchStatus.CANCELLED if batch.status is BatchStatus.CANCELLING else batch.outcome or BatchStatus.COMPLETED


def _expose(uow: UnitOfWork, item: OutboxItem, files: _Files, problem: InputError | None, changed: bool | None) -> None:
    """File rows, counters and the final status, all or nothing.

    A batch whose `output_uri` refused its results fails, and says why; the results are paid for, so its files are there all the same.
    """
    assert item.batch_id is not None
    batch = uow.batches.load(item.batch_id, lock=True)
    if batch.status not in (BatchStatus.FINALIZING, BatchStatus.CANCELLING):
        raise LeaseLost(f"Batch {batch.id} is already {batch.status.value}.")
    counted = (batch.completed, batch.failed, batch.total)
    found = (files.completed, files.failed, files.completed + files.failed + files.missing)
    if counted != found:
        raise BlobCorrupt(f"Batch {batch.id} counts (completed, failed, total) {counted}; its lines say {found}.")
    if files.missing:
        uow.batches.count(batch.id, completed=0, failed=files.missing, usage=Usage())
    status = BatchStatus.FAILED if problem and _end(batch) is BatchStatus.COMPLETED else _end(batch)
    output = _add_file(uow, batch, files.output, f"{batch.id}_output.jsonl")
    errors = _add_file(uow, batch, files.errors, f"{batch.id}_error.jsonl")
    problems = (*batch.errors, problem) if problem else batch.errors
    uow.batches.save(batch.to(status, uow.now, output_file_id=output, error_file_id=errors, errors=problems, input_changed=changed))
    uow.outbox.done(item)


def _add_file(uow: UnitOfWork, batch: Batch, file: _Output, filename: str) -> str | None:
    if file.info is None:
        return None
    assert file.info.sha256 is not None
    expires_at = batch.created_at + timedelta(seconds=batch.output_expires_after) if batch.output_expires_after else None
    row = File(
        id=new_file_id(),
        project_id=batch.project_id,
        purpose=FilePurpose.BATCH_OUTPUT,
        filename=filename,
        bytes=file.info.bytes,
        sha256=file.info.sha256,
        storage_key=file.info.key,
        created_at=uow.now,
        expires_at=expires_at,
    )
    uow.files.add(row)
    return row.id


# --- the spool ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Spool:
    """All segments of a batch, back to back in one scratch file."""

    file: BinaryIO
    starts: Mapping[str, int]

    def line(self, stored: StoredResult) -> bytes:
        """The bytes of a committed line, newline included. Raises BlobCorrupt where they are not a line."""
        self.file.seek(self.starts[stored.segment_key] + stored.offset)
        data = self.file.read(stored.length)
        if len(data) != stored.length or not data.endswith(b"\n"):
            raise BlobCorrupt(f"Segment {stored.segment_key} has no line at {stored.offset}+{stored.length} (line {stored.line_no}).")
        return data


@contextmanager
def _spooled(blobs: BlobStore, segments: Sequence[Segment]) -> Iterator[_Spool]:
    """Fetches every segment once, length and SHA-256 verified. Raises BlobNotFound, BlobCorrupt, Unavailable."""
    starts: dict[str, int] = {}
    with tempfile.TemporaryFile(prefix="longdraft-spool-") as file:
        for segment in segments:
            starts[segment.key] = file.tell()
            _fetch(blobs, segment, file)
        yield _Spool(file, starts)


def _fetch(blobs: BlobStore, segment: Segment, into: BinaryIO) -> None:
    digest, size = hashlib.sha256(), 0
    with blobs.open(segment.key) as stream:
        while portion := stream.read(READ_BYTES):
            digest.update(portion)
            size += len(portion)
            try:
                into.write(portion)
            except OSError as error:
                raise Unavailable(f"The scratch disk is full or broken: {error.strerror or error}.") from error
    if size != segment.bytes or digest.hexdigest() != segment.sha256:
        raise BlobCorrupt(f"Segment {segment.key} has {size} bytes and SHA-256 {digest.hexdigest()}; other values were recorded.")
