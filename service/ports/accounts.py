"""Stores of who there is: projects, their keys, and how they reach their own buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.domain.account import ApiKey, BucketAccess, Project


class AccountStore(Protocol):
    """Projects and their keys."""

    def add_project(self, name: str) -> Project: ...
    def projects(self) -> Sequence[Project]: ...
    def add_key(self, key: ApiKey) -> None: ...
    def keys(self, project_id: str | None = None) -> Sequence[ApiKey]: ...
    def keys_with_prefix(self, prefix: str) -> Sequence[ApiKey]:
        """Live keys only; the caller compares digests in constant time."""
        ...

    def touch_key(self, key_id: str) -> None:
        """Records the use, at most once a minute a key."""
        ...

    def revoke_key(self, key_id: str) -> bool: ...


class BucketAccessStore(Protocol):
    """How projects reach their own buckets: at most one row each."""

    def get(self, project_id: str) -> BucketAccess | None: ...
    def put(self, access: BucketAccess) -> None:
        """Replaces what was there."""
        ...

    def delete(self, project_id: str) -> bool: ...
