"""The application on a real port, on this test's own database and blob store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.memory import MemoryTaskQueue
from service.bootstrap import Services
from service.config import Limits, load_settings
from service.ports import Database
from tests.integration.api_server import ApiServer, Tenant, serve


@pytest.fixture
def api(database: Database, tmp_path: Path) -> Iterator[ApiServer]:
    settings = load_settings({}, data_dir=tmp_path, limits=Limits(max_file_bytes=1_000_000).model_dump())
    services = Services(settings, database, LocalBlobStore(tmp_path / "blobs"), MemoryTaskQueue())
    with serve(services) as server:
        yield server


@pytest.fixture
def tenant(api: ApiServer) -> Iterator[Tenant]:
    with api.tenant() as default:
        yield default
