"""Runs the lines of an ended batch that brought no answer again, as a new batch."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from service.domain.account import File, FilePurpose
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch, BatchStatus
from service.errors import BlobCorrupt, Conflict, InvalidRequest, NotFound
from service.ports import BlobInfo, BlobStore, Database, OutboxKind, UnitOfWork
from service.usecases.keys import Caller
from service.usecases.submit import REPEAT_WITHIN, owned_batch

SKIP_BYTES = 4 << 20
"""A gap up to this long is read and dropped; a longer one is worth a new request to the store."""
COPY_BYTES = 1 << 20


def retry_failed(batch_id: str, *, caller: Caller, database: Database, blobs: BlobStore, blind_repeat: bool = False) -> Batch:
    """Creates a batch from the lines that are not in the output file, byte for byte, and returns it.

    It has the settings of its parent (window counted from now), the newest prices and `parent_batch_id`. `blind_repeat` says that the
    client sends the same request once more because it saw no answer: it gets the batch of the first one, if that was made.

    Raises:
        NotFound: no such batch, or its input file is gone.
        Conflict: the batch has not ended, or never passed validation.
        InvalidRequest: every line succeeded.
    """
    digest = hashlib.sha256(f"retry:{batch_id}".encode()).digest()
    with database.begin() as uow:
        parent = owned_batch(uow, caller.project_id, batch_id)
        _refuse_unless_ended(parent)
        twin = uow.requests.recent_twin(caller.project_id, caller.key_id, digest, REPEAT_WITHIN) if blind_repeat else None
        if twin is not None:
            return owned_batch(uow, caller.project_id, twin)
        source = _input_file(uow, parent)
        # Two integers a line, so that no transaction stays open while bytes are copied: 16 MB for a million lines.
        offsets, lengths = array("q"), array("q")
        for _, offset, length in uow.results.unfinished(batch_id):
            if length:
                offsets.append(offset)
                lengths.append(length)
    if not offsets:
        raise InvalidRequest(f"Batch {batch_id} has no failed lines to retry.", param="batch_id", code="nothing_to_retry")
    file_id = new_file_id()
    info, sha256 = _copy(blobs, source.storage_key, f"files/{file_id}/input.jsonl", offsets, lengths)
    with database.begin() as uow:
        file = File(
            id=file_id,
            project_id=caller.project_id,
            purpose=FilePurpose.BATCH,
            filename=f"{batch_id}_retry.jsonl",
            bytes=info.bytes,
            sha256=sha256,
            storage_key=info.key,
            created_at=uow.now,
        )
        batch = _child(parent, file_id, digest, uow, caller)
        uow.files.add(file)
        uow.batches.add(batch)
        uow.outbox.add(OutboxKind.VALIDATE, batch_id=batch.id)
    return batch


def _refuse_unless_ended(batch: Batch) -> None:
    if not batch.status.terminal:
        raise Conflict(f"Batch {batch.id} is {batch.status.value}; its lines can be retried once it has ended.", param="batch_id")
    if batch.status is BatchStatus.FAILED and batch.finalizing_at is None:
        raise Conflict(f"Batch {batch.id} failed validation; correct the input and create a new batch.", param="batch_id")


def _input_file(uow: UnitOfWork, batch: Batch) -> File:
    file = uow.files.get(batch.project_id, batch.input_file_id) if batch.input_file_id else None
    if file is None:
        raise NotFound("The batch's input file does not exist any more, so its lines cannot be sent again.", param="input_file_id")
    return file


def _child(parent: Batch, file_id: str, digest: bytes, uow: UnitOfWork, caller: Caller) -> Batch:
    return Batch(
        id=new_batch_id(),
        project_id=parent.project_id,
        endpoint=parent.endpoint,
        completion_window=parent.completion_window,
        created_at=uow.now,
        expires_at=uow.now + (parent.expires_at - parent.created_at),
        price_version=uow.ledger.price_book().version,
        api_key_id=caller.key_id,
        input_file_id=file_id,
        metadata=parent.metadata,
        priority=parent.priority,
        on_invalid_line=parent.on_invalid_line,
        drafter=parent.drafter,
        max_cost=parent.max_cost,
        parent_batch_id=parent.id,
        request_digest=digest,
        output_expires_after=parent.output_expires_after,
    )


def _copy(blobs: BlobStore, source: str, target: str, offsets: array[int], lengths: array[int]) -> tuple[BlobInfo, str]:
    """Copies ascending byte ranges of one object into another, each followed by a newline; returns it with its SHA-256."""
    digest = hashlib.sha256()
    with blobs.writer(target) as writer:
        for portion in _ranges(blobs, source, offsets, lengths):
            digest.update(portion)
            writer.write(portion)
        return writer.commit(), digest.hexdigest()


def _ranges(blobs: BlobStore, key: str, offsets: array[int], lengths: array[int]) -> Iterator[bytes]:
    stream: BinaryIO | None = None
    position = 0
    try:
        for offset, length in zip(offsets, lengths, strict=True):
            if stream is None or offset - position > SKIP_BYTES:
                if stream is not None:
                    stream.close()
                stream, position = blobs.open(key, start=offset), offset
            for _ in _portions(stream, offset - position, key):
                pass
            yield from _portions(stream, length, key)
            yield b"\n"
            position = offset + length
    finally:
        if stream is not None:
            stream.close()


def _portions(stream: BinaryIO, length: int, key: str) -> Iterator[bytes]:
    """The next `length` bytes, however few the store hands out at a time."""
    while length:
        portion = stream.read(min(length, COPY_BYTES))
        if not portion:
            raise BlobCorrupt(f"{key} ends {length} bytes before the end of a line that was validated.")
        length -= len(portion)
        yield portion
