"""Files: taken in as a stream, listed, read, deleted."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import BinaryIO
from urllib.parse import unquote

from service.domain.account import File, FilePurpose
from service.domain.ids import new_file_id
from service.errors import Conflict, InvalidRequest, LongdraftError, NotFound, TooLarge
from service.ports import BlobInfo, BlobStore, BlobWriter, Database, Page, UnitOfWork

MAX_FILENAME = 512
EXPIRY_SECONDS = range(3600, 2_592_000 + 1)
_CONTROL = frozenset(map(chr, [*range(32), 127]))


def check_filename(name: str) -> str:
    """The name as it will be shown. It never becomes part of a path; names that look like one are still refused.

    Raises:
        InvalidRequest: empty, too long, with control characters, or with a folder in it (percent-encoded ones count).
    """
    plain = unquote(name)
    if not name or len(name) > MAX_FILENAME:
        raise InvalidRequest(f"The filename must have 1 to {MAX_FILENAME} characters, got {len(name)}.", param="file")
    if plain in (".", "..") or any(mark in plain for mark in "/\\"):
        raise InvalidRequest("The filename must not name a folder: send the last part of the path only.", param="file")
    if _CONTROL.intersection(plain):
        raise InvalidRequest("The filename must not contain control characters.", param="file")
    return name


def check_purpose(purpose: str | None) -> FilePurpose:
    """Raises InvalidRequest for anything that users cannot upload."""
    if purpose is None:
        raise InvalidRequest("Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose != FilePurpose.BATCH:
        raise InvalidRequest(f"'purpose' must be 'batch', got {purpose[:64]!r}.", param="purpose")
    return FilePurpose.BATCH


def check_expiry(anchor: str | None, seconds: str | None) -> timedelta | None:
    """How long after its creation a file expires; None: never.

    Raises:
        InvalidRequest: one of the pair is missing, the anchor is not `created_at`, or the seconds are out of range.
    """
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("'expires_after[anchor]' must be 'created_at'.", param="expires_after[anchor]")
    if seconds is None or not seconds.isascii() or not seconds.isdigit() or len(seconds) > 9 or int(seconds) not in EXPIRY_SECONDS:
        raise InvalidRequest(
            f"'expires_after[seconds]' must be a whole number from {EXPIRY_SECONDS[0]} to {EXPIRY_SECONDS[-1]}.",
            param="expires_after[seconds]",
        )
    return timedelta(seconds=int(seconds))


class FileIntake:
    """A file on its way in: `open`, `write` ..., then `save`. Leaving the block without `save` leaves nothing behind.

    Nothing but the chunk at hand is held in memory. Not thread-safe, but the calls may come from different threads.
    """

    def __init__(self, blobs: BlobStore, project_id: str, *, max_bytes: int, file_id: str | None = None) -> None:
        self._blobs = blobs
        self._project_id = project_id
        self._max_bytes = max_bytes
        self._id = file_id or new_file_id()
        self._cleanup = ExitStack()
        self._writer: BlobWriter | None = None
        self._filename = ""
        self._bytes = 0

    def __enter__(self) -> FileIntake:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open(self, filename: str) -> None:
        """Begins the object. Raises InvalidRequest for a bad name or a second file."""
        if self._writer is not None:
            raise InvalidRequest("Send exactly one 'file' part.", param="file")
        self._filename = check_filename(filename)
        self._writer = self._cleanup.enter_context(self._blobs.writer(f"files/{self._id}/input.jsonl"))

    def write(self, data: bytes) -> None:
        """Raises TooLarge as soon as the limit is passed."""
        assert self._writer is not None
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            raise TooLarge(f"The file is over the limit of {self._max_bytes:,} bytes.", param="file")
        self._writer.write(data)

    def save(self, database: Database, *, purpose: FilePurpose, expires_after: timedelta | None) -> File:
        """Makes the object visible, then the row that names it.

        Raises:
            InvalidRequest: no file was sent.
            Unavailable: the database or the store does not answer; nothing a user could see remains.
        """
        if self._writer is None:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        info = self._writer.commit()
        try:
            with database.begin() as uow:
                file = self._row(info, uow, purpose, expires_after)
                uow.files.add(file)
        except Exception:
            saved = self._after_failure(database, info)
            if saved is None:
                raise
            return saved
        return file

    def close(self) -> None:
        """Drops what was not saved."""
        self._cleanup.close()

    def _row(self, info: BlobInfo, uow: UnitOfWork, purpose: FilePurpose, expires_after: timedelta | None) -> File:
        assert info.sha256 is not None  # a writer always knows it
        return File(
            id=self._id,
            project_id=self._project_id,
            purpose=purpose,
            filename=self._filename,
            bytes=info.bytes,
            sha256=info.sha256,
            storage_key=info.key,
            created_at=uow.now,
            expires_at=uow.now + expires_after if expires_after else None,
        )

    def _after_failure(self, database: Database, info: BlobInfo) -> File | None:
        """A commit whose connection broke may have happened: look, and remove the object only where no row names it.

        Where even the look fails the object stays: an orphan costs a few bytes, a row without its object costs a job.
        """
        try:
            with database.begin() as uow:
                found = uow.files.get(self._project_id, self._id)
            if found is None:
                self._blobs.delete(info.key)
        except LongdraftError:
            return None
        return found


def get_file(database: Database, project_id: str, file_id: str) -> File:
    """Raises NotFound for a file that is unknown, someone else's, deleted or expired: all the same to the caller."""
    with database.begin() as uow:
        return live_file(uow, project_id, file_id)


def live_file(uow: UnitOfWork, project_id: str, file_id: str) -> File:
    """`get_file` inside a transaction."""
    file = uow.files.get(project_id, file_id)
    if file is None:
        raise NotFound("No such file.", param="file_id")
    return file


def list_files(
    database: Database, project_id: str, *, after: str | None, limit: int, ascending: bool, purpose: FilePurpose | None
) -> Page[File]:
    """Files by age, newest first unless `ascending`. Raises InvalidRequest where `after` names no file of the project."""
    with database.begin() as uow:
        return uow.files.page(project_id, after=after, limit=limit, ascending=ascending, purpose=purpose)


def delete_file(database: Database, project_id: str, file_id: str) -> None:
    """Forgets a file; the janitor removes its bytes.

    Raises:
        NotFound: as in `get_file`.
        Conflict: a batch that has not ended reads it.
    """
    with database.begin() as uow:
        uow.requests.lock(project_id, file_lock(file_id))
        live_file(uow, project_id, file_id)
        if uow.files.in_use(file_id):
            raise Conflict("The file is the input of a batch that has not ended: cancel the batch first, or wait.", param="file_id")
        uow.files.delete(project_id, file_id)


def file_lock(file_id: str) -> bytes:
    """What `RequestMemory.lock` takes to keep the creation of a batch and the deletion of its input apart."""
    return hashlib.sha256(b"file:" + file_id.encode()).digest()


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes `start` to `stop` (exclusive) of a file."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def open_content(blobs: BlobStore, file: File, part: Slice) -> BinaryIO:
    """A stream of the bytes. Raises BlobNotFound where the store lost the object."""
    return blobs.open(file.storage_key, start=part.start, length=part.length)
