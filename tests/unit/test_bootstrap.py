"""Wiring: which adapter an address means, and what is said when one is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.blobs_s3 import S3BlobStore
from service.adapters.standin import StandinRunner
from service.bootstrap import make_runner, open_blobs, open_services
from service.config import load_settings
from service.errors import ConfigError


def test_objects_lie_in_the_data_folder_unless_an_address_says_where(tmp_path: Path) -> None:
    store = open_blobs(load_settings({}, data_dir=tmp_path))
    assert isinstance(store, LocalBlobStore)
    store.put("a", b"x")
    assert (tmp_path / "blobs" / "a").read_bytes() == b"x"


def test_a_folder_by_its_address(tmp_path: Path) -> None:
    store = open_blobs(load_settings({}, data_dir=tmp_path, blob_url=f"file://{tmp_path}/with%20space"))
    store.put("a", b"x")
    assert (tmp_path / "with space" / "a").read_bytes() == b"x"


@pytest.mark.parametrize("prefix", ["", "/", "/jobs/2030", "/jobs/2030/"])
def test_a_bucket_by_its_address(tmp_path: Path, prefix: str) -> None:
    store = open_blobs(load_settings({}, data_dir=tmp_path, blob_url=f"s3://bucket{prefix}"))
    assert isinstance(store, S3BlobStore)
    assert store._name("k") == ("jobs/2030/k" if "jobs" in prefix else "k")


@pytest.mark.parametrize("address", ["ftp://host/x", "bucket/prefix", "s3://", "file://relative/x", "file://"])
def test_addresses_that_mean_nothing(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"file:///folder or s3://bucket/prefix"):
        open_blobs(load_settings({}, data_dir=tmp_path, blob_url=address))


@pytest.mark.parametrize("missing", ["database_url", "broker_url"])
def test_a_missing_server_is_named(tmp_path: Path, missing: str) -> None:
    addresses = {"database_url": "postgresql://nowhere/db", "broker_url": "redis://nowhere/0"}
    settings = load_settings({}, data_dir=tmp_path, **{name: url for name, url in addresses.items() if name != missing})
    with pytest.raises(ConfigError, match=f"{missing} is not set"), open_services(settings):
        pass


def test_opening_connects_to_nothing(tmp_path: Path) -> None:
    settings = load_settings({}, data_dir=tmp_path, database_url="postgresql://127.0.0.1:9/db", broker_url="redis://127.0.0.1:9/0")
    with open_services(settings) as services:
        assert services.settings is settings


def test_the_stand_in_is_a_setting(tmp_path: Path) -> None:
    assert isinstance(make_runner(load_settings({}, data_dir=tmp_path, runner="standin")), StandinRunner)
