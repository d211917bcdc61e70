"""One object store of each kind, empty, for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.blobs_s3 import open_s3
from service.adapters.memory import MemoryBlobStore
from service.config import S3
from service.ports import BlobStore


@pytest.fixture(params=["memory", "directory", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    if request.param == "directory":
        return LocalBlobStore(tmp_path / "blobs")
    settings: S3 = request.getfixturevalue("s3_settings")
    return open_s3(request.getfixturevalue("s3_bucket"), "some/prefix", settings)
