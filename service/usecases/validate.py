"""Turns a submitted batch into lines and groups, or into a list of errors.

One pass over the input, staged in short transactions. Each of them holds the outbox item (so only the newest claimant writes) and the
batch (so a cancel or expiry that came first is seen, and one that comes later sees a consistent batch). Whoever takes over after a crash
starts from nothing: the pass is cheap, and its effects become visible to workers only in the last transaction.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from itertools import islice

import structlog

from service.config import Limits
from service.domain.account import File
from service.domain.job import Batch, BatchStatus, InputError, OnInvalidLine
from service.domain.line import LineOutcome, Outcome, PlannedGroup, Segment, StagedLine
from service.domain.object_uri import ObjectUri
from service.domain.request_body import error_body
from service.domain.result_lines import pack_results
from service.domain.usage import Usage
from service.errors import BlobCorrupt, BlobNotFound, LeaseLost
from service.planning.grouping import plan_groups
from service.planning.validate import ErrorList, InputRefused, LineRules, ResolveModel, check_lines, duplicate_error
from service.ports import BlobStore, Database, OutboxItem, OutboxKind, UnitOfWork, UserBuckets
from service.usecases.user_buckets import BucketProblem, CopiedInput, check_output, explained, find_input, open_bucket

READ_BYTES = 1 << 20
CHUNK_LINES = 2000
"""Lines a staging transaction carries: tens of milliseconds of COPY, and a few hundred kilobytes of memory."""
UNREACHABLE_ATTEMPTS = 12
"""A user's store that does not answer is waited for (some six minutes, with the control process's growing delays), not for ever."""
UNREADABLE_ATTEMPTS = 5
"""An input object that is missing or differs from its recorded hash may be a store's bad moment: only this attempt fails the batch."""

log = structlog.get_logger(__name__)


def validate_batch(
    item: OutboxItem,
    *,
    database: Database,
    blobs: BlobStore,
    limits: Limits,
    buckets: UserBuckets,
    resolve_model: ResolveModel,
    lease: timedelta,
    group_lines: int = 64,
) -> None:
    """Carries out a `validate` item and marks it done. Safe to repeat from the start at any point.

    The batch ends up `in_progress` (with groups due and workers woken), `finalizing` (no line is left to run) or `failed`. One that was
    cancelled or expired meanwhile is left as it is.

    Raises:
        LeaseLost: someone else claimed the item; nothing of this call's later work was written.
        Unavailable, BlobNotFound, BlobCorrupt: to be tried again later.
    """
    if item.batch_id is None:
        raise ValueError(f"outbox item {item.id} names no batch")
    validation = _Validation(item, item.batch_id, database, blobs, buckets, limits, lru_cache(256)(resolve_model), lease, group_lines)
    try:
        validation.run()
    except _NoLongerValidating as stopped:
        log.info("validation_stopped", batch_id=item.batch_id, status=str(stopped))
        with database.begin() as uow:
            uow.outbox.hold(item)
            uow.outbox.done(item)


class _NoLongerValidating(Exception):
    """Cancelled or expired in the meantime."""


@dataclass(slots=True)
class _Scan:
    """What the pass over the input found."""

    total: int = 0
    rejected: int = 0
    model: str | None = None
    errors: ErrorList = field(default_factory=ErrorList)


@dataclass(slots=True)
class _Validation:
    item: OutboxItem
    batch_id: str
    database: Database
    blobs: BlobStore
    buckets: UserBuckets
    limits: Limits
    resolve_model: ResolveModel
    lease: timedelta
    group_lines: int
    renewed_at: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        with self._fenced() as (uow, batch):
            uow.lines.clear(batch.id)
            file = uow.files.get(batch.project_id, batch.input_file_id) if batch.input_file_id else None
        try:
            if batch.output_uri is not None:
                self._check_output(batch, batch.output_uri)
            if batch.input_uri is not None:
                self._copy_and_conclude(batch, batch.input_uri)
            else:
                self._conclude(batch, self._scan(batch, self._read(batch, file)))
        except (InputRefused, BucketProblem) as refused:
            self._fail((refused.error,))
        except (BlobNotFound, BlobCorrupt) as error:
            if self.item.attempts < UNREADABLE_ATTEMPTS:
                raise
            name = batch.input_uri or f"file {batch.input_file_id}"
            self._fail((InputError("input_file_unreadable", f"The input {name} cannot be read: {error.message}"),))

    def _conclude(self, batch: Batch, scan: _Scan, copied: CopiedInput | None = None) -> None:
        """After the pass: the batch fails, or what there is to run becomes visible."""
        self._refuse_duplicates(batch, scan)
        if scan.errors:
            self._fail(scan.errors.as_tuple())
            return
        if copied is not None:
            copied.keep()
        try:
            self._finish(scan, copied)
        except (LeaseLost, _NoLongerValidating):
            if copied is not None:
                copied.discard()
            raise

    # --- users' buckets ---------------------------------------------------------------------------------------------------------

    @property
    def _patient(self) -> bool:
        return self.item.attempts < UNREACHABLE_ATTEMPTS

    def _check_output(self, batch: Batch, output_uri: str) -> None:
        """What would go wrong after hours of work goes wrong now."""
        folder = ObjectUri.of_folder(output_uri, param="output_uri")
        with explained(folder, "output_uri", patient=self._patient):
            check_output(open_bucket(self.database, self.buckets, batch.project_id, folder), folder)

    def _copy_and_conclude(self, batch: Batch, input_uri: str) -> None:
        uri = ObjectUri.of_object(input_uri, param="input_uri")
        with explained(uri, "input_uri", patient=self._patient):
            bucket = open_bucket(self.database, self.buckets, batch.project_id, uri)
            version = find_input(bucket, uri, max_bytes=self.limits.max_file_bytes)
        key = f"inputs/{batch.id}/{self.item.token}.jsonl"
        with CopiedInput(uri, bucket, version, self.blobs, key, self._patient) as copied:
            self._conclude(batch, self._scan(batch, self._alive(copied.portions())), copied)

    def _alive(self, portions: Iterator[bytes]) -> Iterator[bytes]:
        """The same; keeps the lease alive."""
        for portion in portions:
            self._keep_lease()
            yield portion

    # --- the pass ---------------------------------------------------------------------------------------------------------------

    def _scan(self, batch: Batch, portions: Iterator[bytes]) -> _Scan:
        """Checks every line and stages it. A refused line is recorded as a result (skip) or an error (fail)."""
        rules = LineRules(
            endpoint=batch.endpoint,
            resolve_model=self.resolve_model,
            max_lines=self.limits.max_lines,
            max_line_bytes=self.limits.max_line_bytes,
            max_json_depth=self.limits.max_json_depth,
        )
        scan = _Scan()
        skip = batch.on_invalid_line is OnInvalidLine.SKIP
        # Verdicts without the parsed bodies: a chunk of long lines would otherwise be the whole file in memory.
        verdicts = ((line.staged, line.error) for line in check_lines(portions, rules))
        while chunk := list(islice(verdicts, CHUNK_LINES)):
            good = [line for line, error in chunk if error is None]
            refused = [(line, error) for line, error in chunk if error is not None]
            scan.total += len(chunk)
            scan.model = scan.model or next((line.model for line in good), None)
            if skip:
                scan.rejected += self._write([line for line, _ in chunk], refused)
            else:
                for _, error in refused:
                    scan.errors.add(error)
                self._write(good, [])
        return scan

    def _read(self, batch: Batch, file: File | None) -> Iterator[bytes]:
        """The input in portions, compared with the file's recorded size and hash at its end; keeps the lease alive."""
        if file is None:
            raise InputRefused(InputError("input_file_not_found", f"The input file {batch.input_file_id} does not exist any more."))
        digest, size = hashlib.sha256(), 0
        with self.blobs.open(file.storage_key) as stream:
            while portion := stream.read(READ_BYTES):
                digest.update(portion)
                size += len(portion)
                self._keep_lease()
                yield portion
        if size != file.bytes or digest.hexdigest() != file.sha256:
            raise BlobCorrupt(
                f"{file.storage_key} has {size} bytes with SHA-256 {digest.hexdigest()}; {file.bytes} with {file.sha256} were recorded."
            )

    def _refuse_duplicates(self, batch: Batch, scan: _Scan) -> None:
        """Lines that repeat a custom_id; the first one that uses it stays good."""
        skip = batch.on_invalid_line is OnInvalidLine.SKIP
        with self.database.begin() as reading:
            duplicates = reading.lines.duplicates(batch.id)
            while chunk := list(islice(duplicates, CHUNK_LINES)):
                refused = [
                    (StagedLine(line_no, 0, 0, custom_id), duplicate_error(line_no, first, custom_id))
                    for line_no, first, custom_id in chunk
                ]
                if skip:
                    scan.rejected += self._write([], refused)
                else:
                    for _, error in refused:
                        scan.errors.add(error)
                self._keep_lease()

    # --- transactions -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _fenced(self) -> Iterator[tuple[UnitOfWork, Batch]]:
        """A transaction that may act for the item."""
        with self.database.begin() as uow:
            yield uow, self._hold(uow)

    def _hold(self, uow: UnitOfWork) -> Batch:
        """Compares the token and locks the batch, which must still be validating."""
        uow.outbox.hold(self.item)
        batch = uow.batches.load(self.batch_id, lock=True)
        if batch.status is not BatchStatus.VALIDATING:
            raise _NoLongerValidating(batch.status.value)
        return batch

    def _keep_lease(self) -> None:
        if time.monotonic() - self.renewed_at < self.lease.total_seconds() / 3:
            return
        with self.database.begin() as uow:
            if not uow.outbox.renew(self.item, self.lease):
                raise LeaseLost(f"Outbox item {self.item.id} was claimed by someone else while batch {self.batch_id} was validated.")
        self.renewed_at = time.monotonic()

    def _write(self, staged: Sequence[StagedLine], refused: Sequence[tuple[StagedLine, InputError]]) -> int:
        """Stages lines and delivers the refusals among them; returns how many of these are new."""
        segment, placed = self._put_segment([refusal(self.batch_id, line, error) for line, error in refused]) if refused else (None, [])
        with self._fenced() as (uow, batch):
            uow.lines.stage(batch.id, staged)
            if segment is None:
                return 0
            # The counters follow in the last transaction, together with the total they must not exceed.
            commit_no = uow.batches.count(batch.id, completed=0, failed=0, usage=Usage())
            return len(uow.results.add(segment, placed, commit_no))

    def _put_segment(self, outcomes: Sequence[LineOutcome]) -> tuple[Segment, list[tuple[LineOutcome, int, int]]]:
        data, placed = pack_results(outcomes)
        info = self.blobs.put(f"segments/{self.batch_id}/v{self.item.token}-{uuid.uuid4().hex}.jsonl", data)
        return Segment(info.key, self.batch_id, len(data), hashlib.sha256(data).hexdigest()), placed

    def _fail(self, errors: tuple[InputError, ...]) -> None:
        with self._fenced() as (uow, batch):
            uow.lines.clear(batch.id)
            uow.batches.save(batch.to(BatchStatus.FAILED, uow.now, errors=errors))
            uow.outbox.done(self.item)
        log.info("batch_failed", batch_id=self.batch_id, code=errors[0].code, line=errors[0].line, errors=len(errors))

    def _finish(self, scan: _Scan, copied: CopiedInput | None) -> None:
        """Groups, status and wake-ups in one transaction: before it workers see nothing, after it everything.

        Planning a million lines takes minutes, so the item is held at the end instead of the beginning: until then its lease can be renewed
        (by this and by the control process), and what was planned without being entitled to it is rolled back.
        """
        models: set[str] = set()
        with self.database.begin() as uow:
            plan = plan_groups(uow.lines.for_grouping(self.batch_id), max_lines=self.group_lines)
            groups = uow.groups.plan(self.batch_id, self._watched(plan, models))
            batch = self._hold(uow)
            if copied is not None:
                uow.files.add(file := copied.file(batch, uow.now))
                batch = batch.evolve(input_file_id=file.id, input_etag=copied.version.etag)
            if groups:
                batch = batch.to(BatchStatus.IN_PROGRESS, uow.now, model=scan.model, total=scan.total)
            else:
                batch = batch.to(BatchStatus.FINALIZING, uow.now, outcome=BatchStatus.COMPLETED, model=scan.model, total=scan.total)
            uow.batches.save(batch)
            if scan.rejected:
                uow.batches.count(batch.id, completed=0, failed=scan.rejected, usage=Usage())
            for model in sorted(models):
                uow.outbox.add(OutboxKind.WAKE, payload={"model": model})
            if not groups:
                uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch.id)
            uow.outbox.done(self.item)
        log.info("batch_validated", batch_id=self.batch_id, lines=scan.total, rejected=scan.rejected, groups=groups)

    def _watched(self, plan: Iterable[PlannedGroup], models: set[str]) -> Iterator[PlannedGroup]:
        """The plan as it is; notes its models and keeps the lease alive."""
        for group in plan:
            models.add(group.model)
            self._keep_lease()
            yield group


def refusal(batch_id: str, line: StagedLine, error: InputError) -> LineOutcome:
    """The result of a line that was never run because it is bad. The message names the line: there may be no custom_id to go by."""
    return LineOutcome(
        batch_id=batch_id,
        line_no=line.line_no,
        group_id=None,
        custom_id=line.custom_id,
        outcome=Outcome.REJECTED,
        status_code=400,
        body=error_body(f"Line {line.line_no}: {error.message}", param=error.param, code=error.code),
        error_code=error.code,
        error_message=error.message,
    )
