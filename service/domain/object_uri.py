"""`s3://bucket/key`: what a batch may name as its input and as the folder of its output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from service.errors import InvalidRequest

MAX_KEY_BYTES = 1024  # S3's own limit
MAX_SEGMENT_BYTES = 255  # what a file name may have
MAX_FOLDER_BYTES = MAX_KEY_BYTES - 64
"""A folder's key leaves room for the names that are written into it."""

# Wider than AWS's own rule: Ceph and others also know capitals and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_ADDRESS = re.compile(r"[0-9.]+")


def is_portable_key(key: str) -> bool:
    """Whether every kind of store can hold this key, and a folder cannot be left with it: `a/b/c`, no empty, '.' or '..' parts."""
    segments = key.split("/")
    return (
        len(key.encode(errors="surrogatepass")) <= MAX_KEY_BYTES
        and not any(segment in ("", ".", "..") or len(segment.encode(errors="surrogatepass")) > MAX_SEGMENT_BYTES for segment in segments)
        and all(character.isprintable() and character != "\\" for character in key)
    )


@dataclass(frozen=True, slots=True)
class ObjectUri:
    """An object, or (with the names that `child` adds) a folder of objects."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def child(self, name: str) -> ObjectUri:
        """The object `name` in this folder."""
        return ObjectUri(self.bucket, f"{self.key}/{name}" if self.key else name)

    @classmethod
    def of_object(cls, text: str, *, param: str) -> Self:
        """Raises InvalidRequest for anything but `s3://bucket/key`."""
        bucket, key = _split(text, param)
        if not is_portable_key(key):
            raise InvalidRequest(
                f"'{param}' must be s3://bucket/key, the key without empty, '.' or '..' parts; got {text[:200]!r}.", param=param
            )
        return cls(bucket, key)

    @classmethod
    def of_folder(cls, text: str, *, param: str) -> Self:
        """`s3://bucket/folder/`, the last slash and the folder optional. Raises InvalidRequest."""
        bucket, key = _split(text, param)
        key = key.removesuffix("/")
        if key and (not is_portable_key(key) or len(key.encode()) > MAX_FOLDER_BYTES):
            raise InvalidRequest(f"'{param}' must be s3://bucket/folder/; got {text[:200]!r}.", param=param)
        if key.endswith((".jsonl", ".json")):
            raise InvalidRequest(
                f"'{param}' names the folder that output.jsonl, errors.jsonl, manifest.json and cost.json are written to; "
                f"{text[:200]!r} looks like an object.",
                param=param,
            )
        return cls(bucket, key)


def _split(text: str, param: str) -> tuple[str, str]:
    scheme, separator, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not separator or not _BUCKET.fullmatch(bucket) or ".." in bucket or _ADDRESS.fullmatch(bucket):
        raise InvalidRequest(f"'{param}' must be an S3 address, s3://bucket/key; got {text[:200]!r}.", param=param)
    return bucket, key
