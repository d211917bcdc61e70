"""boto3 clients for S3 and what speaks its protocol."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

import boto3
from botocore.awsrequest import AWSHTTPSConnection, AWSHTTPSConnectionPool
from botocore.config import Config

from service.adapters.public_addresses import public_address
from service.config import S3

if TYPE_CHECKING:
    import socket

    from mypy_boto3_s3 import S3Client


_making = threading.Lock()


def s3_client(settings: S3, *, attempts: int = 5, guarded: bool = False) -> S3Client:
    """A client for these settings, shared by all who ask for the same; nothing is sent yet. `attempts` bounds boto3's own tries.

    `guarded`: it connects to public addresses only, over TLS and past any proxy; each name is resolved once for each connection, and the
    address that was judged is the one that is connected to.
    """
    with _making:  # boto3 makes clients in one thread at a time; that takes a tenth of a second, so they are kept
        return _made(settings, attempts, guarded)


@lru_cache(32)
def _made(settings: S3, attempts: int, guarded: bool) -> S3Client:
    client = boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region or ("us-east-1" if settings.endpoint_url else None),
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key,
        config=Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=32,
            signature_version="s3v4",
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            request_checksum_calculation=settings.checksums,
            response_checksum_validation=settings.checksums,
            proxies={} if guarded else None,
        ),
    )
    if guarded:
        # botocore has no public way to say how it connects; a test notices if these names move.
        client._endpoint.http_session._manager.pool_classes_by_scheme = {"https": _GuardedPool}  # type: ignore[attr-defined]
    return client


class _GuardedConnection(AWSHTTPSConnection):
    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        self._dns_host = public_address(name, self.port)
        try:
            return super()._new_conn()
        finally:
            self._dns_host = name  # TLS asks for the name


class _GuardedPool(AWSHTTPSConnectionPool):
    ConnectionCls = _GuardedConnection
