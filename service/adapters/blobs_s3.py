"""Objects in a bucket, through boto3: AWS S3, MinIO, R2, Ceph and what else speaks the protocol."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, BinaryIO

import boto3
import structlog
from botocore.config import Config

from service.adapters.blob_parts import Tally, check_key, round_trip
from service.adapters.s3_errors import VENDOR_ERRORS, BeyondTheEnd, vendor_errors
from service.config import S3
from service.errors import BlobCorrupt, BlobNotFound, Conflict, LongdraftError, Unavailable
from service.ports import BlobInfo

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef, GetObjectRequestTypeDef

log = structlog.get_logger(__name__)

SHA256 = "sha256"
"""Metadata name of our own hash. A multipart object has none: its metadata is fixed before its last byte is known."""
READ_BYTES = 1 << 18
REOPEN_TRIES = 4
"""How often in a row a reader asks again for the rest of an object whose stream broke."""


def open_s3(bucket: str, prefix: str, settings: S3, *, attempts: int = 5) -> S3BlobStore:
    """A store on `bucket`, all keys under `prefix`. Nothing is sent yet. `attempts` bounds boto3's own retries of a request."""
    client = boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region or ("us-east-1" if settings.endpoint_url else None),
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key,
        config=Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=32,
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            request_checksum_calculation=settings.checksums,
            response_checksum_validation=settings.checksums,
        ),
    )
    return S3BlobStore(client, bucket, prefix, part_bytes=settings.multipart_bytes)


class S3BlobStore:
    """ports.BlobStore on a bucket. Threads may share it (boto3 clients are thread-safe)."""

    def __init__(self, client: S3Client, bucket: str, prefix: str, *, part_bytes: int) -> None:
        self._client, self._bucket = client, bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes

    def writer(self, key: str) -> S3Writer:
        return S3Writer(self, self._client, self._bucket, self._name(key), key, self._part_bytes)

    def put(self, key: str, data: bytes) -> BlobInfo:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit()

    def open(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        name = self._name(key)
        if length == 0:
            if self.head(key) is None:
                raise BlobNotFound(f"No object under {key!r}.")
            return io.BytesIO()
        reader = S3Reader(self._client, self._bucket, name, start, None if length is None else start + length)
        return io.BufferedReader(reader, READ_BYTES)

    def head(self, key: str) -> BlobInfo | None:
        name = self._name(key)
        try:
            with vendor_errors(f"asking for {key!r} in {self._bucket}"):
                found = self._client.head_object(Bucket=self._bucket, Key=name)
        except BlobNotFound:
            return None
        return BlobInfo(key, found["ContentLength"], found.get("Metadata", {}).get(SHA256))

    def delete(self, key: str) -> None:
        name = self._name(key)
        with contextlib.suppress(BlobNotFound), vendor_errors(f"deleting {key!r} in {self._bucket}"):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
        with vendor_errors(f"listing {prefix!r} in {self._bucket}"):
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield BlobInfo(entry["Key"].removeprefix(self._prefix), entry["Size"], None)

    def probe(self) -> Mapping[str, str]:
        done = round_trip(self)
        conditional = "yes" if self._refuses_second_put() else "no"
        return {"store": "s3", "bucket": self._bucket, "endpoint": self._client.meta.endpoint_url, **done, "conditional put": conditional}

    def discard_abandoned(self, older_than: timedelta) -> int:
        """Aborts multipart uploads that began longer ago than this and never ended; returns how many."""
        before, aborted = datetime.now(UTC) - older_than, 0
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
        with vendor_errors(f"looking for abandoned uploads in {self._bucket}"):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < before:
                        self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                        aborted += 1
        return aborted

    def _refuses_second_put(self) -> bool:
        name = self._name(f"probe/{uuid.uuid4().hex}")
        try:
            with vendor_errors(f"probing {self._bucket}"):
                for _ in range(2):
                    self._client.put_object(Bucket=self._bucket, Key=name, Body=b"probe", IfNoneMatch="*")
        except LongdraftError:  # 412 where it is honoured; a store that does not know the header may answer anything
            return True
        else:
            return False
        finally:
            with contextlib.suppress(*VENDOR_ERRORS):
                self._client.delete_object(Bucket=self._bucket, Key=name)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)


class S3Writer:
    """ports.BlobWriter: one put while the object is small, otherwise parts of equal size; holds one part in memory.

    Every request body goes with its MD5, so the store itself refuses what was damaged on the way; what it holds is then asked for.
    """

    def __init__(self, store: S3BlobStore, client: S3Client, bucket: str, name: str, key: str, part_bytes: int) -> None:
        self._store, self._client, self._bucket, self._name, self._key = store, client, bucket, name, key
        self._part_bytes = part_bytes
        self._buffer, self._tally = bytearray(), Tally()
        self._upload: str | None = None
        self._parts: list[CompletedPartTypeDef] = []

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
            # The reply may be lost and the object there. Keys are never used twice, so what matches is ours.
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
        if self._upload is not None:
            # What cannot be aborted now is found by `discard_abandoned`.
            with contextlib.suppress(*VENDOR_ERRORS):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._name, UploadId=self._upload)

    def _finish(self, info: BlobInfo) -> None:
        if self._upload is None:
            with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
                body = bytes(self._buffer)
                metadata = {SHA256: self._tally.sha256}
                self._client.put_object(Bucket=self._bucket, Key=self._name, Body=body, ContentMD5=_md5(body), Metadata=metadata)
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
        body = bytes(self._buffer)
        with vendor_errors(f"writing {self._key!r} to {self._bucket}"):
            if self._upload is None:
                self._upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._name)["UploadId"]
            number = len(self._parts) + 1
            sent = self._client.upload_part(
                Bucket=self._bucket, Key=self._name, UploadId=self._upload, PartNumber=number, Body=body, ContentMD5=_md5(body)
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._buffer.clear()

    def _is_there(self, info: BlobInfo) -> bool:
        found = self._store.head(self._key)
        return found is not None and found.bytes == info.bytes and found.sha256 in (None, info.sha256)


class S3Reader(io.RawIOBase):
    """A range of one object. A stream that breaks is asked for again from where it broke, and only of the same version (ETag)."""

    def __init__(self, client: S3Client, bucket: str, name: str, start: int, end: int | None) -> None:
        self._client, self._bucket, self._name = client, bucket, name
        self._position = self._end = start
        self._etag: str | None = None
        self._body: BinaryIO | None = None
        answer = self._get(start, end)
        if answer is not None:
            self._end = start + answer["ContentLength"]
            self._etag = answer["ETag"]

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

    def _get(self, start: int, end: int | None) -> GetObjectOutputTypeDef | None:
        """Asks for the bytes; None where the object ends before `start`."""
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
            return None
        self._body = answer["Body"]  # type: ignore[assignment]  # a StreamingBody: read and close are all we use
        return answer


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
