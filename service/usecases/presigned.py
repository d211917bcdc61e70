"""Files that clients put into and get from the object store themselves, by URLs that are good for a while.

What was put is looked at once, when it is registered: its bytes are copied to where files lie, counted and hashed on the way. The URL leads
to another place than the file, so that what was registered cannot be changed by putting again.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.domain.account import File, FilePurpose, PendingUpload
from service.domain.ids import new_file_id
from service.errors import BlobNotFound, Conflict, InvalidRequest, NotFound, TooLarge
from service.ports import BlobStore, Database, PresignedRequest, Presigner
from service.usecases.files import FileIntake, check_filename, live_file

LIFETIME = timedelta(hours=1)
"""How long a URL is good for."""
READ_BYTES = 1 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A request that a client may send, and until when."""

    file_id: str
    request: PresignedRequest
    expires_at: datetime


def start_upload(
    database: Database,
    blobs: BlobStore,
    project_id: str,
    *,
    filename: str,
    size: int,
    sha256: str | None,
    expires_after: timedelta | None,
    max_bytes: int,
) -> SignedFile:
    """Where to put a file of exactly `size` bytes; `register_upload` makes it one.

    Raises:
        InvalidRequest: the name, the hash, or a store that clients cannot reach.
        TooLarge: over the limit of files.
    """
    signer = _presigner(blobs)
    check_filename(filename)
    if size > max_bytes:
        raise TooLarge(f"The file is over the limit of {max_bytes:,} bytes.", param="bytes")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InvalidRequest("'sha256' must be 64 lower-case hexadecimal digits.", param="sha256")
    file_id = new_file_id()
    key = f"uploads/{file_id}"
    request = signer.presigned_put(key, size=size, lifetime=LIFETIME)
    with database.begin() as uow:
        seconds = int(expires_after.total_seconds()) if expires_after else None
        upload = PendingUpload(file_id, project_id, filename, size, sha256, key, uow.now, uow.now + LIFETIME, seconds)
        uow.uploads.add(upload)
    return SignedFile(file_id, request, upload.expires_at)


def register_upload(database: Database, blobs: BlobStore, project_id: str, file_id: str) -> File:
    """Makes what was put a file, its size and hash verified while it is read. Registering it again answers the same file.

    Raises:
        NotFound: no such upload.
        Conflict: nothing was put yet, or other bytes than were announced.
    """
    with database.begin() as uow:
        upload = uow.uploads.get(project_id, file_id)
        if upload is None:
            done = uow.files.get(project_id, file_id)
            if done is None:
                raise NotFound("No such upload.", param="file_id")
            return done
    digest, size = hashlib.sha256(), 0
    with FileIntake(blobs, project_id, max_bytes=upload.bytes, file_id=upload.id) as intake:
        intake.open(upload.filename)
        try:
            with blobs.open(upload.storage_key) as stream:
                while (portion := stream.read(READ_BYTES)) and size <= upload.bytes:
                    digest.update(portion)
                    size += len(portion)
                    if size <= upload.bytes:
                        intake.write(portion)
        except BlobNotFound:
            raise Conflict("Nothing was put at the upload's URL yet: send the PUT first.", param="file_id") from None
        if size != upload.bytes:
            raise Conflict(f"The upload does not have the {upload.bytes:,} bytes that were announced.", param="bytes")
        if upload.sha256 not in (None, digest.hexdigest()):
            raise Conflict(f"The upload's SHA-256 is {digest.hexdigest()}; {upload.sha256} was announced.", param="sha256")
        expires_after = timedelta(seconds=upload.file_expires_after) if upload.file_expires_after else None
        file = intake.save(database, purpose=FilePurpose.BATCH, expires_after=expires_after)
    blobs.delete(upload.storage_key)
    with database.begin() as uow:
        uow.uploads.remove(upload.id)
    return file


def download_url(database: Database, blobs: BlobStore, project_id: str, file_id: str) -> SignedFile:
    """Where to get a file's bytes. Raises NotFound, or InvalidRequest for a store that clients cannot reach."""
    with database.begin() as uow:
        file = live_file(uow, project_id, file_id)
        expires_at = uow.now + LIFETIME
    request = _presigner(blobs).presigned_get(file.storage_key, filename=file.filename, lifetime=LIFETIME)
    return SignedFile(file_id, request, expires_at)


def _presigner(blobs: BlobStore) -> Presigner:
    if not isinstance(blobs, Presigner):
        raise InvalidRequest(
            "This server keeps its objects in a folder, so there are no presigned URLs: use POST /v1/files and "
            "GET /v1/files/{file_id}/content.",
            code="presigned_urls_unavailable",
        )
    return blobs
