"""What only the directory store can get wrong: left-overs, links out of the folder, a full or closed disk."""

from __future__ import annotations

import errno
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from service.adapters import blobs_local
from service.adapters.blobs_local import INCOMING, LocalBlobStore
from service.errors import BlobCorrupt, InvalidRequest, Unavailable


def leftovers(root: Path) -> list[Path]:
    return list((root / INCOMING).iterdir())


def test_a_crash_leaves_its_bytes_aside_until_the_janitor_comes(blob_root: Path) -> None:
    store = LocalBlobStore(blob_root)
    writer = store.writer("a/b")  # and never left: the process died
    writer.write(b"half")
    writer._file.flush()
    assert list(store.list("")) == []
    assert store.discard_abandoned(timedelta(hours=1)) == 0
    os.utime(leftovers(blob_root)[0], (time.time() - 7200,) * 2)
    assert store.discard_abandoned(timedelta(hours=1)) == 1
    assert leftovers(blob_root) == []


def test_the_staging_folder_is_not_a_key(blob_root: Path) -> None:
    with pytest.raises(InvalidRequest):
        LocalBlobStore(blob_root).put(f"{INCOMING}/x", b"")


def test_objects_are_private_and_empty_folders_go(tmp_path: Path) -> None:
    root = tmp_path / "new"
    store = LocalBlobStore(root)
    store.put("a/b/c", b"x")
    assert root.stat().st_mode & 0o777 == 0o700
    assert (root / "a/b/c").stat().st_mode & 0o777 == 0o600
    store.delete("a/b/c")
    assert sorted(path.name for path in root.iterdir()) == [INCOMING]


def test_a_full_disk_is_an_outage_and_leaves_nothing(blob_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalBlobStore(blob_root)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blobs_local.os, "fsync", full)
    with pytest.raises(Unavailable, match=r"No space left on device.*Free some space"):
        store.put("a", b"x")
    assert store.head("a") is None
    assert leftovers(blob_root) == []


def test_what_the_disk_changed_is_not_shown(blob_root: Path) -> None:
    store = LocalBlobStore(blob_root)
    with store.writer("a") as writer:
        writer.write(b"good")
        writer._file.flush()
        leftovers(blob_root)[0].write_bytes(b"evil")
        with pytest.raises(BlobCorrupt):
            writer.commit()
    assert store.head("a") is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match=str(tmp_path / "file")):
        LocalBlobStore(tmp_path / "file" / "blobs")
