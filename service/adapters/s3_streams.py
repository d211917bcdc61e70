"""Streams into and out of one object of a bucket."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, BinaryIO

import structlog

from service.adapters.blob_parts import Tally
from service.adapters.s3_errors import VENDOR_ERRORS, BeyondTheEnd, NotOffered, vendor_errors
from service.errors import BlobCorrupt, BlobNotFound, Conflict, Unavailable
from service.ports import BlobInfo

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef, GetObjectRequestTypeDef

log = structlog.get_logger(__name__)

SHA256 = "sha256"
"""Metadata name of our own hash. A multipart object has none: its metadata is fixed before its last byte is known."""
REOPEN_TRIES = 4
"""How often in a row a reader asks again for the rest of an object whose stream broke."""


@dataclass(slots=True)
class Features:
    """What a store can do, as far as it is known: by the probe, or by the first request that it did not take. None: not known yet."""

    multipart: bool | None = None
    conditional_put: bool | None = None


@dataclass(frozen=True, slots=True)
class ObjectName:
    """An object as the store and as we call it."""

    client: S3Client
    bucket: str
    name: str
    key: str


class S3Writer:
    """ports.BlobWriter: one put while the object is small, otherwise parts of equal size; holds one part in memory.

    Where the store has no multipart uploads the object goes over the scratch disk into one put. Every request body goes with its MD5, so
    the store itself refuses what was damaged on the way; what it holds is then asked for.
    """

    def __init__(self, target: ObjectName, head: Callable[[str], BlobInfo | None], features: Features, part_bytes: int) -> None:
        self._target, self._head, self._features = target, head, features
        self._client, self._bucket, self._name, self._key = target.client, target.bucket, target.name, target.key
        self._part_bytes = part_bytes
        self._buffer, self._tally = bytearray(), Tally()
        self._upload: str | None = None
        self._parts: list[CompletedPartTypeDef] = []
        self._spool: IO[bytes] | None = None

    def write(self, data: bytes | memoryview) -> None:
        self._tally.add(data)
        rest = memoryview(data)
        while len(self._buffer) + len(rest) > self._part_bytes:  # not at equality: the last part is sent by `commit`
            room = self._part_bytes - len(self._buffer)
            self._buffer += rest[:room]
            rest = rest[room:]
            self._send_part()
        self._buffer += rest

    def commit(self) -> BlobInfo:
        info = self._tally.info(self._key)
        try:
            self._finish(info)
        except Unavailable as lost:
            # The reply may be lost and the object there. Keys are never used twice for other bytes, so what matches is ours.
            if not self._is_there(info):
                raise
            log.info("store_reply_lost", key=self._key, error=str(lost))
        else:
            if not self._is_there(info):
                raise BlobCorrupt(f"The store took {self._key!r} ({info.bytes} bytes) and does not hold it so.")
        self._upload = None
        return info

    def __enter__(self) -> S3Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._buffer.clear()
        if self._spool is not None:
            self._spool.close()
        if self._upload is not None:
            # What cannot be aborted now is found by `discard_abandoned`.
            with contextlib.suppress(*VENDOR_ERRORS):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._name, UploadId=self._upload)

    def _finish(self, info: BlobInfo) -> None:
        if self._spool is not None:
            self._put_spool(self._spool)
            return
        if self._upload is None:
            with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
                body = bytes(self._buffer)
                metadata = {SHA256: self._tally.sha256}
                self._client.put_object(Bucket=self._bucket, Key=self._name, Body=body, ContentMD5=md5(body), Metadata=metadata)
            return
        self._send_part()
        try:
            # boto3 turns a 200 with an error inside into the error it is.
            with vendor_errors(f"completing {self._key!r} in {self._bucket}"):
                self._client.complete_multipart_upload(
                    Bucket=self._bucket, Key=self._name, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
                )
        except BlobNotFound as gone:  # NoSuchUpload: an earlier try got through and its reply was lost, or someone aborted it
            raise Unavailable(f"The upload of {self._key!r} ({info.bytes} bytes) is gone from the store.") from gone

    def _send_part(self) -> None:
        if self._spool is None and self._upload is None:
            self._begin()
        if self._spool is not None:
            self._spool_buffer(self._spool)
            return
        assert self._upload is not None
        body = bytes(self._buffer)
        with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
            number = len(self._parts) + 1
            sent = self._client.upload_part(
                Bucket=self._bucket, Key=self._name, UploadId=self._upload, PartNumber=number, Body=body, ContentMD5=md5(body)
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._buffer.clear()

    def _begin(self) -> None:
        """A multipart upload, or the scratch disk where the store has none."""
        if self._features.multipart is not False:
            try:
                with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
                    self._upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._name)["UploadId"]
            except NotOffered:
                self._features.multipart = False
            else:
                return
        self._spool = tempfile.TemporaryFile(prefix="longdraft-put-")  # noqa: SIM115 - closed by __exit__

    def _spool_buffer(self, spool: IO[bytes]) -> None:
        try:
            spool.write(self._buffer)
        except OSError as error:
            raise Unavailable(f"The scratch disk is full or broken: {error.strerror or error}.") from error
        self._buffer.clear()

    def _put_spool(self, spool: IO[bytes]) -> None:
        self._spool_buffer(spool)
        spool.seek(0)
        digest = base64.b64encode(hashlib.file_digest(spool, "md5").digest()).decode()  # type: ignore[arg-type]  # it is a real file
        spool.seek(0)
        metadata = {SHA256: self._tally.sha256}
        with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
            self._client.put_object(Bucket=self._bucket, Key=self._name, Body=spool, ContentMD5=digest, Metadata=metadata)

    def _is_there(self, info: BlobInfo) -> bool:
        found = self._head(self._key)
        return found is not None and found.bytes == info.bytes and found.sha256 in (None, info.sha256)


class S3Reader(io.RawIOBase):
    """A range of one object. A stream that breaks is asked for again from where it broke, and only of the same version (ETag)."""

    def __init__(self, target: ObjectName, start: int, end: int | None, etag: str | None = None) -> None:
        self._client, self._bucket, self._name = target.client, target.bucket, target.name
        self._position = self._end = start
        self._etag = etag
        self._body: BinaryIO | None = None
        self._get(start, end)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the base class is only typed for any buffer
        for failures in range(REOPEN_TRIES + 1):
            if self._position == self._end or self._body is None:
                return 0
            try:
                data = self._read(self._body, len(buffer))
            except Unavailable:
                if failures == REOPEN_TRIES:
                    raise
                time.sleep(0.1 * 2**failures)
                self._get(self._position, self._end)
            else:
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        raise AssertionError("the loop returns or raises")

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()

    def _read(self, body: BinaryIO, size: int) -> bytes:
        with vendor_errors(f"reading {self._name!r} in {self._bucket}"):
            data = body.read(min(size, self._end - self._position))
        if not data:
            raise Unavailable(f"The stream of {self._name!r} ended at byte {self._position} of {self._end}.")
        return data

    def _get(self, start: int, end: int | None) -> None:
        """Asks for the bytes; there is no body where the object ends before `start`."""
        request: GetObjectRequestTypeDef = {"Bucket": self._bucket, "Key": self._name}
        if start or end is not None:
            request["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if self._etag is not None:
            request["IfMatch"] = self._etag
        try:
            with vendor_errors(f"reading {self._name!r} in {self._bucket}"):
                answer = self._client.get_object(**request)
        except Conflict as changed:
            raise BlobCorrupt(f"Object {self._name!r} was replaced while it was read.") from changed
        except BeyondTheEnd:
            return
        if self._etag not in (None, answer["ETag"]):  # the store does not know the condition
            raise BlobCorrupt(f"Object {self._name!r} was replaced while it was read.")
        self._etag = answer["ETag"]
        self._take(answer, start, end, ranged="Range" in request)

    def _take(self, answer: GetObjectOutputTypeDef, start: int, end: int | None, *, ranged: bool) -> None:
        body: BinaryIO = answer["Body"]  # type: ignore[assignment]  # a StreamingBody: read and close are all we use
        length = answer["ContentLength"]
        if ranged and not answer.get("ContentRange"):  # the store does not know ranges: this is the whole object
            length = max(0, min(length if end is None else end, length) - start)
            if length:
                _skip(body, start, self._name)
        self._body, self._end = body, start + length


def _skip(body: BinaryIO, count: int, name: str) -> None:
    with vendor_errors(f"reading {name!r}"):
        while count and (data := body.read(min(count, 1 << 20))):
            count -= len(data)
    if count:
        raise Unavailable(f"The stream of {name!r} ended before the bytes that were asked for.")


def md5(data: bytes) -> str:
    """As the Content-MD5 header wants it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
