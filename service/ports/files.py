"""Stores of what clients brought: files, announced uploads, and what is left of those that are gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from service.domain.account import File, FilePurpose, PendingUpload
from service.ports.page import Page


class FileStore(Protocol):
    """Files by owner. A deleted file answers like an unknown one."""

    def add(self, file: File) -> None: ...
    def get(self, project_id: str, file_id: str) -> File | None: ...
    def page(self, project_id: str, *, after: str | None, limit: int, ascending: bool, purpose: FilePurpose | None) -> Page[File]:
        """Raises InvalidRequest where `after` names no file of this project."""
        ...

    def delete(self, project_id: str, file_id: str) -> bool: ...
    def set_expiry(self, file_id: str, at: datetime) -> None: ...
    def in_use(self, file_id: str) -> bool:
        """Whether a batch that has not ended reads it."""
        ...


class UploadStore(Protocol):
    """Files that clients were given a URL to put."""

    def add(self, upload: PendingUpload) -> None: ...
    def get(self, project_id: str, upload_id: str) -> PendingUpload | None: ...
    def remove(self, upload_id: str) -> None: ...
    def stale(self, older_than: timedelta, limit: int) -> Sequence[PendingUpload]:
        """Those whose URL ran out longer ago than this, oldest first."""
        ...


class FileGarbage(Protocol):
    """Objects of files that nobody needs any more."""

    def unreferenced_keys(self, limit: int) -> Sequence[str]:
        """Storage keys of deleted or expired files that no open batch reads: the janitor removes the objects."""
        ...

    def forget_keys(self, keys: Collection[str]) -> None: ...
    def named(self, keys: Collection[str]) -> set[str]:
        """Those of these keys that any file, deleted ones included, or any announced upload names."""
        ...
