"""Users' buckets: opened with a project's own credentials or the deployment's, and only where the deployment lets them lead."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from service.adapters.blobs_s3 import S3BlobStore
from service.adapters.public_addresses import PrivateAddress, public_address
from service.adapters.s3_client import s3_client
from service.adapters.vault import Vault
from service.config import S3
from service.domain.account import BucketAccess
from service.errors import BucketRefused

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class S3Buckets:
    """ports.UserBuckets. `own` is the bucket and prefix of the deployment's own objects: no project reaches them with its role."""

    def __init__(self, settings: S3, vault: Vault, *, own: tuple[str, str] | None) -> None:
        self._settings, self._vault, self._own = settings, vault, own

    def open(self, bucket: str, access: BucketAccess | None) -> S3BlobStore:
        if access is not None:
            return self._bucket(self._client(access), bucket, None)
        if not any(fnmatchcase(bucket, pattern) for pattern in self._settings.role_buckets):
            raise BucketRefused(
                f"This deployment does not open the bucket {bucket} with its own role: the operator can allow it in s3.role_buckets, "
                "or give the project credentials of its own."
            )
        own = self._own[1] if self._own and self._own[0] == bucket else None
        return self._bucket(s3_client(self._settings), bucket, own)

    def seal(self, project_id: str, secret: str) -> bytes:
        return self._vault.seal(project_id, secret)

    def check_endpoint(self, url: str) -> None:
        parts = urlsplit(url)
        if self._settings.allow_private_endpoints and parts.scheme in ("http", "https") and parts.hostname:
            return
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise BucketRefused(f"An endpoint is https://host[:port]; got {_without_user(url)!r}.", code="endpoint_not_allowed")
        try:
            public_address(parts.hostname, parts.port or 443)
        except PrivateAddress as error:
            raise BucketRefused(f"The endpoint is not allowed here: {error}.", code="endpoint_not_allowed") from error
        except (OSError, ValueError) as error:
            raise BucketRefused(f"The endpoint {parts.hostname} does not resolve: {error}.", code="endpoint_not_allowed") from error

    def _client(self, access: BucketAccess) -> S3Client:
        guarded = access.endpoint_url is not None and not self._settings.allow_private_endpoints
        if access.endpoint_url is not None:
            self.check_endpoint(access.endpoint_url)
        settings = S3(
            endpoint_url=access.endpoint_url,
            region=access.region,
            access_key_id=access.access_key_id,
            secret_access_key=self._vault.open(access.project_id, access.sealed_secret),
            path_style=access.path_style,
            checksums="when_supported" if access.checksums == "when_supported" else "when_required",
        )
        return s3_client(settings, guarded=guarded)

    def _bucket(self, client: S3Client, bucket: str, own: str | None) -> S3BlobStore:
        if own is None:
            return S3BlobStore(client, bucket, "", part_bytes=self._settings.multipart_bytes)
        return _SharedBucket(client, bucket, "", part_bytes=self._settings.multipart_bytes, own=own)


class _SharedBucket(S3BlobStore):
    """A bucket that also holds the deployment's own objects, which belong to other projects too."""

    def __init__(self, client: S3Client, bucket: str, prefix: str, *, part_bytes: int, own: str) -> None:
        super().__init__(client, bucket, prefix, part_bytes=part_bytes)
        self._own = f"{own}/" if own else ""

    def _name(self, key: str) -> str:
        name = super()._name(key)
        if name.startswith(self._own):
            raise BucketRefused(f"{name!r} in {self._bucket} lies among the deployment's own objects: use another folder or bucket.")
        return name


def _without_user(url: str) -> str:
    """A URL may carry a password: it is not repeated."""
    scheme, separator, rest = url[:200].partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
