"""Projects, API keys and files: what a tenant owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Project:
    id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as stored: never the secret, only its public prefix and a keyed digest."""

    id: str
    project_id: str
    name: str
    prefix: str
    digest: bytes
    created_at: datetime
    scopes: tuple[str, ...] = ("all",)
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class BucketAccess:
    """How a project reaches its own buckets. The secret is sealed: only the process that talks to the bucket opens it."""

    project_id: str
    access_key_id: str
    sealed_secret: bytes = field(repr=False)
    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool = False
    checksums: str = "when_required"
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """A file that a client was given a URL to put: not visible before it is registered. `sha256` None: the client did not say."""

    id: str
    project_id: str
    filename: str
    bytes: int
    sha256: str | None
    storage_key: str
    created_at: datetime
    expires_at: datetime
    file_expires_after: int | None = None


class FilePurpose(StrEnum):
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


@dataclass(frozen=True, slots=True)
class File:
    """A file whose bytes are complete in the blob store under `storage_key`."""

    id: str
    project_id: str
    purpose: FilePurpose
    filename: str
    bytes: int
    sha256: str
    storage_key: str
    created_at: datetime
    expires_at: datetime | None = None
    deleted_at: datetime | None = None
