"""Folders that machines share through a blob store: on the directory and on S3 over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.checkpoints.cache import make_once
from service.adapters.blobs_local import LocalBlobStore
from service.adapters.blobs_s3 import open_s3
from service.adapters.shared_cache import BlobFolders
from service.ports import BlobStore


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "directory":
        return LocalBlobStore(tmp_path / "bucket")
    return open_s3(request.getfixturevalue("s3_bucket"), "cache", request.getfixturevalue("s3_settings"))


def build(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x00\x01" * 50_000)


def never(folder: Path) -> None:
    raise AssertionError("it is there already")


def test_what_one_machine_made_the_next_one_has(store: BlobStore, tmp_path: Path) -> None:
    shared = BlobFolders(store)
    first = make_once(tmp_path / "one" / "models" / "m-v1", build, shared)
    second = make_once(tmp_path / "two" / "models" / "m-v1", never, shared)
    assert {path.name: path.read_bytes() for path in second.iterdir()} == {path.name: path.read_bytes() for path in first.iterdir()}


def test_bytes_that_changed_are_not_used(store: BlobStore, tmp_path: Path) -> None:
    shared = BlobFolders(store)
    make_once(tmp_path / "one" / "models" / "m-v1", build, shared)
    store.put("models/m-v1/model.safetensors", b"something else")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not shared.get("models/m-v1", empty)
    assert not list(empty.iterdir())


def test_a_manifest_that_names_files_elsewhere_is_not_followed(store: BlobStore, tmp_path: Path) -> None:
    store.put("models/m-v1/manifest.json", json.dumps({"files": {"../outside": "0" * 64}}).encode())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not BlobFolders(store).get("models/m-v1", empty)
    assert not (tmp_path / "outside").exists()


def test_half_a_folder_does_not_exist(store: BlobStore, tmp_path: Path) -> None:
    store.put("models/m-v1/config.json", b"{}")
    assert not BlobFolders(store).get("models/m-v1", tmp_path)


def test_a_store_that_is_away_costs_nothing_but_the_making(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = request.getfixturevalue("s3_settings").model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    made = make_once(tmp_path / "models" / "m-v1", build, BlobFolders(open_s3("nowhere", "cache", settings)))
    assert (made / "config.json").exists()
