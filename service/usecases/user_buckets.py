"""Users' buckets as a batch sees them: the object it is read from, and refusals in words that its owner can act on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import TracebackType

from service.domain.account import File, FilePurpose
from service.domain.ids import copied_input_id
from service.domain.job import Batch, InputError
from service.domain.object_uri import ObjectUri
from service.errors import BlobCorrupt, BlobDenied, BlobNotFound, BucketMissing, BucketRefused, LongdraftError, Unavailable
from service.ports import BlobInfo, BlobStore, BlobWriter, Database, UserBucket, UserBuckets

READ_BYTES = 1 << 20
COPY_KEPT = timedelta(days=30)
"""How long after the end of a batch's window the copy of its input stays, so that failed lines can be sent again."""


class BucketProblem(Exception):
    """A batch cannot go on because of what a user's bucket says; `error` is for the batch's `errors`."""

    def __init__(self, error: InputError) -> None:
        super().__init__(error.message)
        self.error = error


def open_bucket(database: Database, buckets: UserBuckets, project_id: str, uri: ObjectUri) -> UserBucket:
    """With the project's own credentials where it has some. Raises BucketRefused."""
    with database.begin() as uow:
        access = uow.bucket_access.get(project_id)
    return buckets.open(uri.bucket, access)


@contextmanager
def explained(uri: ObjectUri, param: str, *, patient: bool) -> Iterator[None]:
    """What a bucket answers as a BucketProblem. Outages (and objects that change under the reader) are one only where we are no longer
    `patient`; before that they pass through, to be tried again."""
    try:
        yield
    except BlobNotFound as error:
        raise _problem(param, "not_found", f"There is no object {uri}.", error) from error
    except BucketMissing as error:
        raise _problem(param, "not_found", f"There is no bucket {uri.bucket}, or these credentials may not see it.", error) from error
    except BlobDenied as error:
        advice = (
            f"Access to {uri} is denied. Check the credentials (`longdraft s3 credentials show`), that they may "
            f"{'read' if param == 'input_uri' else 'read and write'} there, and the name of the bucket and the key."
        )
        raise _problem(param, "denied", advice, error) from error
    except BucketRefused as error:
        raise BucketProblem(InputError(error.code, error.message, param=param)) from error
    except BlobCorrupt as error:
        if patient:
            raise
        what = "changed again and again while it was read" if param == "input_uri" else "does not hold what was written to it"
        raise _problem(param, "unreliable", f"{uri} {what}.", error) from error
    except Unavailable as error:
        if patient:
            raise
        raise _problem(param, "unavailable", f"The store of {uri} did not answer for a long time.", error) from error


def _problem(param: str, code: str, message: str, error: LongdraftError) -> BucketProblem:
    return BucketProblem(InputError(f"{param}_{code}", f"{message} The store says: {error.message}", param=param))


# --- the input ------------------------------------------------------------------------------------------------------------------


def find_input(bucket: UserBucket, uri: ObjectUri, *, max_bytes: int) -> BlobInfo:
    """The object and the version of it that is there now. Raises BlobNotFound, BucketMissing, BucketProblem where it is too large."""
    found = bucket.head(uri.key)
    if found is None:
        bucket.open(uri.key).close()  # a HEAD cannot say whether the object or its bucket is missing
        raise BlobNotFound(f"No object under {uri.key!r}.")
    if found.bytes > max_bytes:
        message = f"{uri} has {found.bytes:,} bytes; an input may have {max_bytes:,}."
        raise BucketProblem(InputError("input_uri_too_large", message, param="input_uri"))
    return found


@dataclass(slots=True)
class CopiedInput:
    """A batch's input while it is read from a user's bucket: one version of the object, copied into our store as it goes by.

    Workers read the copy. Whatever happens to the object afterwards, all lines of the batch come from the bytes that were validated.
    """

    uri: ObjectUri
    bucket: UserBucket
    version: BlobInfo
    blobs: BlobStore
    key: str
    patient: bool
    _writer: BlobWriter = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)
    _info: BlobInfo | None = None

    def __enter__(self) -> CopiedInput:
        self._writer = self._stack.enter_context(self.blobs.writer(self.key))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def portions(self) -> Iterator[bytes]:
        """The object's bytes. Raises BucketProblem, or what `explained` lets through."""
        with explained(self.uri, "input_uri", patient=self.patient):
            stream = self.bucket.open(self.uri.key, etag=self.version.etag)
        with stream:
            while True:
                with explained(self.uri, "input_uri", patient=self.patient):
                    portion = stream.read(READ_BYTES)
                if not portion:
                    return
                self._writer.write(portion)
                yield portion

    def keep(self) -> None:
        """After the last portion: the copy stays."""
        self._info = self._writer.commit()

    def discard(self) -> None:
        """Removes a copy that `keep` made, when no row will name it."""
        if self._info is not None:
            self.blobs.delete(self._info.key)

    def file(self, batch: Batch, now: datetime) -> File:
        """The copy as a file of the batch's owner."""
        assert self._info is not None
        assert self._info.sha256 is not None
        return File(
            id=copied_input_id(batch.id),
            project_id=batch.project_id,
            purpose=FilePurpose.BATCH,
            filename=self.uri.name,
            bytes=self._info.bytes,
            sha256=self._info.sha256,
            storage_key=self._info.key,
            created_at=now,
            expires_at=batch.expires_at + COPY_KEPT,
        )


def has_changed(database: Database, buckets: UserBuckets, batch: Batch) -> bool | None:
    """Whether another object lies at the batch's `input_uri` than the one that was read; None where that cannot be told now."""
    if batch.input_uri is None or batch.input_etag is None:
        return None
    uri = ObjectUri.of_object(batch.input_uri, param="input_uri")
    try:
        found = open_bucket(database, buckets, batch.project_id, uri).head(uri.key)
    except (BlobDenied, BucketRefused, Unavailable):
        return None
    return found is None or found.etag != batch.input_etag


# --- the output's folder --------------------------------------------------------------------------------------------------------

MANIFEST = "manifest.json"


def check_output(bucket: UserBucket, folder: ObjectUri) -> None:
    """Before anything runs: the folder can be written to, and no batch has finished there. Raises BucketProblem, and what buckets raise."""
    manifest = folder.child(MANIFEST)
    if is_there(bucket, manifest.key):
        raise taken_folder(folder)
    bucket.check_writable(manifest.key)


def is_there(bucket: UserBucket, key: str) -> bool:
    """AWS denies a look at what is not there to those who may not list: whoever is denied it here is told so by the put that follows."""
    try:
        return bucket.head(key) is not None
    except BlobDenied:
        return False


def taken_folder(folder: ObjectUri) -> BucketProblem:
    """Results are never mixed with those of another batch, nor written over them."""
    message = (
        f"{folder.child(MANIFEST)} exists: another batch wrote its results to this folder. Use a folder for each batch, "
        "or remove the manifest to have what is there overwritten."
    )
    return BucketProblem(InputError("output_uri_taken", message, param="output_uri"))


def sha256_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()
