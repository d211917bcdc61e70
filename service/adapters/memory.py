"""In-memory object store and task queue: for tests and single-process runs, under the same contract suites as the real ones."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import BinaryIO

from service.adapters.blob_parts import Tally, check_key, round_trip
from service.domain.account import BucketAccess
from service.errors import BlobCorrupt, BlobNotFound, BucketMissing
from service.ports import BlobInfo


class MemoryBlobStore:
    """ports.BlobStore and ports.UserBucket in a dictionary."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[BlobInfo, bytes]] = {}
        self._lock = threading.Lock()

    def writer(self, key: str) -> MemoryWriter:
        return MemoryWriter(self, check_key(key))

    def put(self, key: str, data: bytes) -> BlobInfo:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit()

    def open(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> BinaryIO:
        with self._lock:
            found = self._objects.get(check_key(key))
        if found is None:
            raise BlobNotFound(f"No object under {key!r}.")
        if etag not in (None, found[0].etag):
            raise BlobCorrupt(f"Object {key!r} was replaced while it was read.")
        return io.BytesIO(found[1][start : None if length is None else start + length])

    def head(self, key: str) -> BlobInfo | None:
        with self._lock:
            found = self._objects.get(check_key(key))
        return found[0] if found else None

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        with self._lock:
            found = [info for key, (info, _) in sorted(self._objects.items()) if key.startswith(prefix)]
        return iter(found)

    def discard_abandoned(self, older_than: timedelta) -> int:  # noqa: ARG002 - a writer's bytes go with the writer
        return 0

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            taken = self._objects.get(check_key(key)) is not None
        if not taken:
            self.put(key, data)
        return not taken

    def check_writable(self, key: str) -> None:
        """It always is."""

    def probe(self) -> Mapping[str, str]:
        return {"store": "memory", **round_trip(self)}

    def _show(self, info: BlobInfo, data: bytes) -> None:
        with self._lock:
            self._objects[info.key] = (info, data)


class MemoryWriter:
    """ports.BlobWriter that shows the object at `commit`."""

    def __init__(self, store: MemoryBlobStore, key: str) -> None:
        self._store, self._key = store, key
        self._data, self._tally = bytearray(), Tally()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data
        self._tally.add(data)

    def commit(self) -> BlobInfo:
        info = replace(self._tally.info(self._key), etag=self._tally.sha256)
        self._store._show(info, bytes(self._data))
        return info

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._data.clear()


class MemoryBuckets:
    """ports.UserBuckets: the buckets that the test made. Secrets are kept as they are."""

    def __init__(self, **buckets: MemoryBlobStore) -> None:
        self.buckets = buckets

    def open(self, bucket: str, access: BucketAccess | None) -> MemoryBlobStore:  # noqa: ARG002 - no credentials are looked at
        if bucket not in self.buckets:
            raise BucketMissing(f"The bucket {bucket} does not exist.")
        return self.buckets[bucket]

    def seal(self, project_id: str, secret: str) -> bytes:  # noqa: ARG002 - nothing is encrypted here
        return secret.encode()

    def check_endpoint(self, url: str) -> None:
        """Any will do."""


class MemoryTaskQueue:
    """ports.TaskQueue that remembers what was woken, in order."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, model: str) -> None:
        self.woken.append(model)

    def ping(self) -> None:
        """Always there."""
