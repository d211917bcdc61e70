"""What the object stores share: which keys are fine, the running length and hash of a put, a probe."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Mapping
from typing import BinaryIO

from service.domain.object_uri import MAX_KEY_BYTES, is_portable_key
from service.errors import BlobCorrupt, BlobNotFound, InvalidRequest, Unavailable
from service.ports import BlobInfo, BlobStore


def check_key(key: str) -> str:
    """The key itself, where every store can hold it and a folder cannot be left with it. Raises InvalidRequest."""
    if not is_portable_key(key):
        raise InvalidRequest(f"{key[:200]!r} is not a storage key: a/b/c, without empty, '.' or '..' parts, at most {MAX_KEY_BYTES} bytes.")
    return key


class Tally:
    """Length and SHA-256 of what went by."""

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()

    def add(self, data: bytes | memoryview) -> None:
        self.bytes += len(data)
        self._hash.update(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def info(self, key: str) -> BlobInfo:
        return BlobInfo(key, self.bytes, self.sha256)


class Slice(io.RawIOBase):
    """The first `length` bytes from where `source` stands; closes it with itself."""

    def __init__(self, source: BinaryIO, length: int) -> None:
        self._source = source
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the base class is only typed for any buffer
        data = self._source.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


def round_trip(blobs: BlobStore) -> Mapping[str, str]:
    """Writes, reads back and deletes a small object.

    Raises:
        Unavailable: one of the steps failed, or the store answered other bytes than it was given.
    """
    key, data = f"probe/{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        blobs.put(key, data)
        try:
            with blobs.open(key) as stream:
                read = stream.read()
        finally:
            blobs.delete(key)
    except (BlobCorrupt, BlobNotFound) as error:
        raise Unavailable(f"The object store lost a probe object: {error.message}") from error
    if read != data:
        raise Unavailable("The object store gave back other bytes than it was given.")
    return {"put": "yes", "read": "yes", "delete": "yes"}
