"""A cluster on this test's own database and store; `stores` runs a test on the directory and on S3 over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.config import S3
from tests.faults.cluster import Cluster, cluster


@pytest.fixture
def faulty(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Cluster]:
    """On the directory store."""
    with cluster(tmp_path, database_url=database_url, broker_url=broker_url, blob_url=f"file://{tmp_path}/blobs") as running:
        yield running


@pytest.fixture
def faulty_s3(database_url: str, broker_url: str, tmp_path: Path, s3_settings: S3, s3_bucket: str) -> Iterator[Cluster]:
    """On a bucket over HTTP."""
    values = {name: str(value) for name, value in s3_settings.model_dump(exclude_none=True).items()}
    with cluster(tmp_path, database_url=database_url, broker_url=broker_url, blob_url=f"s3://{s3_bucket}/prefix", s3=values) as running:
        yield running


@pytest.fixture(params=["directory", "s3"])
def stores(request: pytest.FixtureRequest) -> Cluster:
    found: Cluster = request.getfixturevalue({"directory": "faulty", "s3": "faulty_s3"}[request.param])
    return found
