"""The billing oracles O1-O7: what must hold of every batch, whatever happened on the way.

The rows are checked by the database (one query each), the files by reading them once, line by line, beside the rows they came from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import BinaryIO

from service.billing.ledger import amount
from service.domain.account import File
from service.domain.ids import batch_request_id
from service.domain.job import Batch, BatchStatus
from service.domain.line import Outcome, Segment
from service.domain.money import LedgerKind, PriceBook
from service.domain.result_lines import ResultLine, decode_result
from service.domain.usage import Usage
from service.errors import BlobNotFound
from service.ports import BlobStore, ChargeFilter, Database, UnitOfWork

PAGE = 100
READ_BYTES = 1 << 20
_ENDED = (BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)
_MOMENT = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Violation:
    """An oracle that does not hold. `batch_id` is None where the sentence itself names what it is about."""

    oracle: str
    message: str
    batch_id: str | None = None

    def __str__(self) -> str:
        where = f" ({self.batch_id})" if self.batch_id else ""
        return f"{self.oracle}{where}: {self.message}"


def check(database: Database, blobs: BlobStore, batch_id: str | None = None) -> list[Violation]:
    """Checks one batch, or everything. Memory is flat; every ended batch's segments and files are read once. Raises Unavailable."""
    with database.begin() as uow:
        found = [Violation(sentence[:2], sentence[3:].strip()) for sentence in uow.ledger.violations(batch_id)]
        chosen = [uow.batches.load(batch_id)] if batch_id else []
    for batch in chosen or _all_batches(database):
        found.extend(_check_segments(database, blobs, batch))
        if batch.status in _ENDED or batch.output_file_id or batch.error_file_id:
            found.extend(_check_files(database, blobs, batch))
    return found


def _all_batches(database: Database) -> Iterator[Batch]:
    with database.begin() as uow:
        projects = uow.accounts.projects()
    for project in projects:
        after = None
        while True:
            with database.begin() as uow:
                page = uow.batches.page(project.id, after=after, limit=PAGE)
            yield from page.items
            if not page.has_more:
                break
            after = page.items[-1].id


# --- O6 of segments -------------------------------------------------------------------------------------------------------------


def _check_segments(database: Database, blobs: BlobStore, batch: Batch) -> Iterator[Violation]:
    with database.begin() as uow:
        segments = uow.results.segments(batch.id)
    for segment in segments:
        problem = _differs(blobs, segment)
        if problem:
            yield Violation("O6", problem, batch.id)


def _differs(blobs: BlobStore, segment: Segment) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        with blobs.open(segment.key) as stream:
            while portion := stream.read(READ_BYTES):
                digest.update(portion)
                size += len(portion)
    except BlobNotFound:
        return f"segment {segment.key} is gone"
    if (size, digest.hexdigest()) != (segment.bytes, segment.sha256):
        return f"segment {segment.key} has {size} bytes and another hash than was recorded ({segment.bytes} bytes)"
    return None


# --- O1, O4, O5, O6 of the two files --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """An output or error file, read line by line, its size and hash taken on the way."""

    name: str
    stream: BinaryIO | None
    bytes: int = 0
    lines: int = 0
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def next(self) -> ResultLine | None:
        """The next line; None at the end. Raises ValueError or KeyError where it is not a result."""
        raw = self.stream.readline() if self.stream else b""
        if not raw:
            return None
        self.bytes += len(raw)
        self.hash.update(raw)
        self.lines += 1
        return decode_result(raw)

    def close(self) -> None:
        if self.stream:
            self.stream.close()


def _check_files(database: Database, blobs: BlobStore, batch: Batch) -> Iterator[Violation]:
    """Skips batches whose files were deleted or have expired: nothing is left to compare."""
    with database.begin() as uow:
        ids = {"output": batch.output_file_id, "error": batch.error_file_id}
        files = {name: uow.files.get(batch.project_id, file_id) if file_id else None for name, file_id in ids.items()}
        if any(file_id and files[name] is None for name, file_id in ids.items()):
            return
        try:
            output, errors = (_Reader(name, _open(blobs, files[name])) for name in ("output", "error"))
        except BlobNotFound as gone:
            yield Violation("O6", gone.message, batch.id)
            return
        try:
            yield from _compare(uow, batch, output, errors)
        except (ValueError, KeyError) as error:
            yield Violation("O1", f"a file has a line that is not a result: {error}", batch.id)
        finally:
            output.close()
            errors.close()
        for reader in (output, errors):
            if (file := files[reader.name]) and (reader.bytes, reader.hash.hexdigest()) != (file.bytes, file.sha256):
                yield Violation("O6", f"the {reader.name} file has other bytes than were recorded", batch.id)


def _open(blobs: BlobStore, file: File | None) -> BinaryIO | None:
    return blobs.open(file.storage_key) if file else None


def _compare(uow: UnitOfWork, batch: Batch, output: _Reader, errors: _Reader) -> Iterator[Violation]:
    usage: Counter[str] = Counter()
    billed = 0
    book = uow.ledger.price_book(batch.price_version)
    for line_no, custom_id, stored in uow.results.in_order(batch.id):
        succeeded = stored is not None and stored.outcome is Outcome.SUCCEEDED
        reader = output if succeeded else errors
        line = reader.next()
        if line is None or line.id != batch_request_id(batch.id, line_no) or line.custom_id != custom_id:
            yield Violation("O1", f"line {line_no} is not where it belongs in the {reader.name} file", batch.id)
            return
        if succeeded:
            billed += _price(line, book, usage)
    for reader in (output, errors):
        if reader.next() is not None:
            yield Violation("O1", f"the {reader.name} file goes on after the last line", batch.id)
    if (output.lines, errors.lines) != (batch.completed, batch.failed):
        found = f"{output.lines} and {errors.lines} lines"
        yield Violation("O5", f"counts {batch.completed} completed and {batch.failed} failed; the files have {found}", batch.id)
    yield from _check_bill(uow, batch, billed, usage)


def _check_bill(uow: UnitOfWork, batch: Batch, billed: int, usage: Counter[str]) -> Iterator[Violation]:
    """O4: the ledger's charges (before any reversal) against the usage that the customer can download."""
    which = ChargeFilter(batch.created_at, uow.now + _MOMENT, batch_ids=[batch.id])
    charged = sum(detail.amount for detail in uow.costs.details(which) if detail.kind is LedgerKind.CHARGE)
    if charged != billed:
        yield Violation("O4", f"{charged} femto-dollars are charged; the output's usage at the pinned prices is {billed}", batch.id)
    counted = {"input": batch.usage.input_tokens, "cached": batch.usage.cached_tokens, "output": batch.usage.output_tokens}
    if counted != {name: usage[name] for name in counted}:
        yield Violation("O5", f"counts the tokens {counted}; its output says {dict(usage)}", batch.id)


def _price(line: ResultLine, book: PriceBook, total: Counter[str]) -> int:
    """Femto-dollars of a line, from its body alone."""
    assert line.body is not None
    reported = line.body["usage"]
    cached = (reported.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    usage = Usage(input_tokens=reported["prompt_tokens"], cached_tokens=cached, output_tokens=reported["completion_tokens"])
    total.update(input=usage.input_tokens, cached=usage.cached_tokens, output=usage.output_tokens)
    return amount(usage, book.rates(line.body["model"]))
