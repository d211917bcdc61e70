"""In-memory object store and task queue: for tests and single-process runs, under the same contract suites as the real ones."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import BinaryIO

from service.adapters.blob_parts import Tally, check_key, round_trip
from service.errors import BlobNotFound
from service.ports import BlobInfo


class MemoryBlobStore:
    """ports.BlobStore in a dictionary."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[BlobInfo, bytes]] = {}
        self._lock = threading.Lock()

    def writer(self, key: str) -> MemoryWriter:
        return MemoryWriter(self, check_key(key))

    def put(self, key: str, data: bytes) -> BlobInfo:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit()

    def open(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        with self._lock:
            found = self._objects.get(check_key(key))
        if found is None:
            raise BlobNotFound(f"No object under {key!r}.")
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
        info = self._tally.info(self._key)
        self._store._show(info, bytes(self._data))
        return info

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._data.clear()


class MemoryTaskQueue:
    """ports.TaskQueue that remembers what was woken, in order."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, model: str) -> None:
        self.woken.append(model)

    def ping(self) -> None:
        """Always there."""
