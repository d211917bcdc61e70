"""One database a module, a project of its own for every test; the application on it, on a real port."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.memory import MemoryTaskQueue
from service.bootstrap import Services
from service.config import load_settings
from service.ports import Database
from tests.integration.api_server import ApiServer, Tenant, serve


@pytest.fixture
def db(module_database: Database) -> Database:
    return module_database


@pytest.fixture
def project(db: Database) -> str:
    with db.begin() as uow:
        return uow.accounts.add_project(uuid4().hex).id


@pytest.fixture(scope="module")
def api(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("api")
    settings = load_settings({}, data_dir=folder, limits={"max_file_bytes": 1_000_000})
    services = Services(settings, module_database, LocalBlobStore(folder / "blobs"), MemoryTaskQueue())
    with serve(services) as server:
        yield server


@pytest.fixture
def tenant(api: ApiServer) -> Iterator[Tenant]:
    with api.tenant() as own:
        yield own


@pytest.fixture
def stranger(api: ApiServer) -> Iterator[Tenant]:
    """Another project's."""
    with api.tenant() as other:
        yield other


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that anybody may walk into: as root PostgreSQL runs as another user."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    return tmp_path
