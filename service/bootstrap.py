"""Wires adapters to ports: the only composition root. Vendor libraries load when a part is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.config import Settings
from service.domain.request_body import GenerationRequest
from service.errors import ConfigError
from service.ports import BlobStore, Database, InferenceRunner, TaskQueue, UserBuckets


@dataclass(frozen=True, slots=True)
class Services:
    """What the entry points hand to use cases."""

    settings: Settings
    database: Database
    blobs: BlobStore
    queue: TaskQueue

    @property
    def buckets(self) -> UserBuckets:
        """Users' own buckets. Nothing is connected by asking for it."""
        return open_buckets(self.settings)


@contextlib.contextmanager
def open_services(settings: Settings) -> Iterator[Services]:
    """Opens database, object store and queue of complete settings (see `supervisor.deployment`). Nothing is connected before its first use.

    Raises:
        ConfigError: an address is missing or names something unknown.
    """
    database = open_database(settings)
    try:
        yield Services(settings, database, open_blobs(settings), open_queue(settings))
    finally:
        database.close()


def open_database(settings: Settings) -> Database:
    from service.adapters.unit_of_work import PostgresDatabase

    if not settings.database_url:
        raise ConfigError("database_url is not set: name a PostgreSQL, or use `longdraft up`, which brings one.", param="database_url")
    # Whoever says nothing for as long as a lease has lost what it held, locks like groups.
    return PostgresDatabase(settings.database_url, patience=settings.timing.lease)


def open_blobs(settings: Settings) -> BlobStore:
    """The store that `blob_url` names: a directory (default `data_dir/blobs`) or a bucket."""
    from service.adapters.blobs_local import LocalBlobStore

    if not settings.blob_url:
        return LocalBlobStore(settings.data_dir / "blobs")
    return _open_store("blob_url", settings.blob_url, settings)


def _open_store(setting: str, address: str, settings: Settings) -> BlobStore:
    from service.adapters.blobs_local import LocalBlobStore

    url = urlsplit(address)
    if url.scheme == "file" and not url.netloc and url.path:
        return LocalBlobStore(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        from service.adapters.blobs_s3 import open_s3

        return open_s3(url.netloc, url.path.strip("/"), settings.s3)
    raise ConfigError(f"{setting} is {address!r}: write file:///folder or s3://bucket/prefix.", param=setting)


def open_buckets(settings: Settings) -> UserBuckets:
    """The way to users' buckets; `blob_url`'s own bucket and prefix are kept apart from them."""
    from service.adapters.buckets_s3 import S3Buckets
    from service.adapters.vault import Vault

    url = urlsplit(settings.blob_url or "")
    own = (url.netloc, url.path.strip("/")) if url.scheme == "s3" else None
    return S3Buckets(settings.s3, Vault(settings.credentials_key, settings.data_dir / "credentials_key"), own=own)


def open_queue(settings: Settings) -> TaskQueue:
    from service.adapters.queue_celery import CeleryQueue

    if not settings.broker_url:
        raise ConfigError("broker_url is not set: name a Redis or Valkey, or use `longdraft up`, which brings one.", param="broker_url")
    return CeleryQueue(settings.broker_url)


def local_tokenizers(settings: Settings) -> Callable[[str], Callable[[GenerationRequest], int] | None]:
    """Model -> what counts the prompt tokens of a line, where its tokenizer is on this machine: for estimates, without torch."""
    from service.adapters.token_counter import LocalTokenizers

    return LocalTokenizers(settings.models, settings.cache_dir).for_model


def make_runner(settings: Settings) -> InferenceRunner:
    """What answers lines in a worker. Importing the engine takes seconds, so only workers come here."""
    if settings.runner == "standin":
        from service.adapters.standin import StandinRunner

        return StandinRunner(settings)
    from service.adapters.engine_runner import EngineRunner

    shared = None
    if settings.cache_url:
        from service.adapters.shared_cache import BlobFolders

        shared = BlobFolders(_open_store("cache_url", settings.cache_url, settings))
    return EngineRunner(settings.models, settings.engine, settings.cache_dir, shared)
