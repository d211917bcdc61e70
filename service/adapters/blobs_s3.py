"""Objects in a bucket, through boto3: AWS S3, MinIO, R2, Ceph and what else speaks the protocol."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from service.adapters.blob_parts import check_key, round_trip
from service.adapters.s3_client import s3_client
from service.adapters.s3_errors import VENDOR_ERRORS, NotOffered, vendor_errors
from service.adapters.s3_probe import examine
from service.adapters.s3_streams import REOPEN_TRIES, SHA256, Features, ObjectName, S3Reader, S3Writer, md5
from service.config import S3
from service.errors import BlobNotFound, Conflict
from service.ports import BlobInfo, PresignedRequest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["REOPEN_TRIES", "S3BlobStore", "open_s3"]

READ_BYTES = 1 << 18


def open_s3(bucket: str, prefix: str, settings: S3, *, attempts: int = 5) -> S3BlobStore:
    """A store on `bucket`, all keys under `prefix`. Nothing is sent yet. `attempts` bounds boto3's own retries of a request."""
    client = s3_client(settings, attempts=attempts)
    outside = settings.public_endpoint_url
    public = s3_client(settings.model_copy(update={"endpoint_url": outside})) if outside else client
    return S3BlobStore(client, bucket, prefix, part_bytes=settings.multipart_bytes, public=public)


class S3BlobStore:
    """ports.BlobStore, ports.UserBucket and ports.Presigner on a bucket. Threads may share it (boto3 clients are thread-safe).

    `public` signs the URLs that clients get: it may know the store under another address than we do.
    """

    def __init__(self, client: S3Client, bucket: str, prefix: str, *, part_bytes: int, public: S3Client | None = None) -> None:
        self._client, self._bucket = client, bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes
        self._public = public or client
        self._features = Features()

    def writer(self, key: str) -> S3Writer:
        return S3Writer(self._object(key), self.head, self._features, self._part_bytes)

    def put(self, key: str, data: bytes) -> BlobInfo:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit()

    def open(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> BinaryIO:
        target = self._object(key)
        if length == 0:
            if self.head(key) is None:
                raise BlobNotFound(f"No object under {key!r}.")
            return io.BytesIO()
        reader = S3Reader(target, start, None if length is None else start + length, etag)
        return io.BufferedReader(reader, READ_BYTES)

    def head(self, key: str) -> BlobInfo | None:
        name = self._name(key)
        try:
            with vendor_errors(f"asking for {key!r} in {self._bucket}"):
                found = self._client.head_object(Bucket=self._bucket, Key=name)
        except BlobNotFound:
            return None
        return BlobInfo(key, found["ContentLength"], found.get("Metadata", {}).get(SHA256), found.get("ETag"))

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
        """Also remembers what was found: writers and `create` then do not try what the store cannot do."""
        done = round_trip(self)
        found = examine(self._client, self._bucket, self._prefix)
        self._features.multipart = found["multipart"] == "yes"
        self._features.conditional_put = found["conditional put"] == "yes"
        return {"store": "s3", "bucket": self._bucket, "endpoint": self._client.meta.endpoint_url, **done, **found}

    def discard_abandoned(self, older_than: timedelta) -> int:
        """Aborts multipart uploads that began longer ago than this and never ended; returns how many."""
        if self._features.multipart is False:
            return 0
        before, aborted = datetime.now(UTC) - older_than, 0
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
        # A store that has no such list, or (rclone) nothing to put on it.
        with contextlib.suppress(NotOffered, BlobNotFound), vendor_errors(f"looking for abandoned uploads in {self._bucket}"):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < before:
                        self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                        aborted += 1
        return aborted

    # --- ports.UserBucket -----------------------------------------------------------------------------------------------------

    def create(self, key: str, data: bytes) -> bool:
        """Puts a small object where there is none. Atomic where the store knows conditional puts, else as good as a look before."""
        name = self._name(key)
        if self._features.conditional_put is not False:
            try:
                with vendor_errors(f"writing {key!r} to {self._bucket}"):
                    self._client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentMD5=md5(data), IfNoneMatch="*")
            except Conflict:
                return False
            except NotOffered:
                self._features.conditional_put = False
            else:
                return True
        if self.head(key) is not None:
            return False
        self.put(key, data)
        return True

    def check_writable(self, key: str) -> None:
        """Begins a multipart upload and gives it up: the same permission as a put, and nothing to see."""
        name = self._name(key)
        try:
            with vendor_errors(f"writing {key!r} to {self._bucket}"):
                upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=name)["UploadId"]
        except NotOffered:
            return
        with contextlib.suppress(*VENDOR_ERRORS):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload)

    # --- ports.Presigner ------------------------------------------------------------------------------------------------------

    def presigned_put(self, key: str, *, size: int, lifetime: timedelta) -> PresignedRequest:
        where = {"Bucket": self._bucket, "Key": self._name(key), "ContentLength": size}
        return PresignedRequest("PUT", self._signed("put_object", where, lifetime), {"Content-Length": str(size)})

    def presigned_get(self, key: str, *, filename: str, lifetime: timedelta) -> PresignedRequest:
        shown = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        where = {"Bucket": self._bucket, "Key": self._name(key), "ResponseContentDisposition": shown}
        return PresignedRequest("GET", self._signed("get_object", where, lifetime), {})

    def _signed(self, operation: str, where: Mapping[str, object], lifetime: timedelta) -> str:
        with vendor_errors(f"signing a URL for {self._bucket}"):
            return self._public.generate_presigned_url(operation, Params=where, ExpiresIn=int(lifetime.total_seconds()))

    def _object(self, key: str) -> ObjectName:
        return ObjectName(self._client, self._bucket, self._name(key), key)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)
