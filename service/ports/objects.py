"""Objects: blobs of our own, and buckets of users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import BinaryIO, Protocol, runtime_checkable

from service.domain.account import BucketAccess


@dataclass(frozen=True, slots=True)
class BlobInfo:
    key: str
    bytes: int
    sha256: str | None
    etag: str | None = None
    """The store's own name of this version of the object; None where it has none."""


class BlobWriter(Protocol):
    """A streaming put. Nothing is visible before `commit`; leaving the block without it leaves nothing behind."""

    def write(self, data: bytes | memoryview) -> None: ...
    def commit(self) -> BlobInfo:
        """Makes the object visible, length and SHA-256 verified."""
        ...

    def __enter__(self) -> BlobWriter: ...
    def __exit__(self, *exc: object) -> None: ...


class BlobStore(Protocol):
    """Objects by key (`a/b/c`: no leading slash, no key is the folder of another). Puts are atomic: readers never see half an object."""

    def writer(self, key: str) -> BlobWriter: ...
    def put(self, key: str, data: bytes) -> BlobInfo: ...
    def open(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        """A stream of the bytes (or a range of them). Raises BlobNotFound."""
        ...

    def head(self, key: str) -> BlobInfo | None: ...
    def delete(self, key: str) -> None:
        """Idempotent."""
        ...

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        """In key order. For garbage collection only: nothing is learned by listing."""
        ...

    def discard_abandoned(self, older_than: timedelta) -> int:
        """Removes what puts that never ended left behind; returns how many."""
        ...

    def probe(self) -> Mapping[str, str]:
        """Writes, reads back and deletes a small object; what the store is and can do. Raises Unavailable."""
        ...


class UserBucket(Protocol):
    """A user's own bucket. Raises BlobDenied, BucketMissing, BlobNotFound, Unavailable."""

    def head(self, key: str) -> BlobInfo | None: ...
    def open(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> BinaryIO:
        """A stream of one version of the object: BlobCorrupt where it is no longer (or never was) `etag`."""
        ...

    def writer(self, key: str) -> BlobWriter: ...
    def create(self, key: str, data: bytes) -> bool:
        """Puts a small object where there is none; False, and nothing changed, where there is one."""
        ...

    def check_writable(self, key: str) -> None:
        """Finds out, without leaving an object, whether `writer` would be let in."""
        ...


class UserBuckets(Protocol):
    """The way to users' buckets, with a project's own credentials or (None) the deployment's."""

    def open(self, bucket: str, access: BucketAccess | None) -> UserBucket:
        """Nothing is sent yet. Raises BucketRefused where this deployment does not go there, or cannot open the secret."""
        ...

    def seal(self, project_id: str, secret: str) -> bytes:
        """The secret as it may be stored: only for this project, and only with the deployment's key."""
        ...

    def check_endpoint(self, url: str) -> None:
        """Raises BucketRefused for an address that a project may not name."""
        ...


@dataclass(frozen=True, slots=True)
class PresignedRequest:
    """What a client may do once or more until the URL runs out. `headers` are part of what is signed: send them as they are."""

    method: str
    url: str
    headers: Mapping[str, str]


@runtime_checkable
class Presigner(Protocol):
    """What a store can do whose clients reach it themselves."""

    def presigned_put(self, key: str, *, size: int, lifetime: timedelta) -> PresignedRequest: ...
    def presigned_get(self, key: str, *, filename: str, lifetime: timedelta) -> PresignedRequest: ...
